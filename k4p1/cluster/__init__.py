"""Training on a parameter-server cluster: servers hold the vectors, every task has its own group of workers."""
