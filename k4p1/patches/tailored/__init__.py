"""The network of a tailored task: paths, their layers, the graph that they make, and its complexity (NT)."""
