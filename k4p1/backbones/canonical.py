"""Canonical layer names: the same for every build of a network in any process.

Keras numbers automatic names through the life of a process, so the second InceptionV3 of a process has other names than
the first. A canonical name is the given name, or for an automatic one the class and its rank among the automatically named
layers of that class, in topological order. Layers of an inner model carry its name as a prefix, `inner/conv2d_3`.
"""

import re
from collections.abc import Iterator

import keras


def rename(model: keras.Model) -> None:
    """Gives every layer of a functional model, inner models included, its canonical name within its model.

    Operations without variables, such as the `+` of `x + y`, are named like layers.
    """
    taken = {layer.name for layer in operations(model) if not _is_automatic(layer)}
    ranks: dict[str, int] = {}
    for layer in operations(model):
        if is_graph(layer):
            rename(layer)
        if _is_automatic(layer):
            first, name = stem(layer), None
            while name is None or name in taken:
                name = f"{first}_{ranks.get(first, 0)}"
                ranks[first] = ranks.get(first, 0) + 1
            layer.name = name


def leaf_layers(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.layers.Layer]]:
    """The (canonical name, layer) pairs of a renamed model in topological order, inner models opened."""
    for layer in operations(model):
        if is_graph(layer):
            yield from leaf_layers(layer, f"{prefix}{layer.name}/")
        elif isinstance(layer, keras.layers.Layer):
            yield prefix + layer.name, layer


def is_graph(layer: keras.layers.Layer) -> bool:
    """Whether the layer is an inner model whose layers can be patched one by one (functional or sequential)."""
    return isinstance(layer, keras.Sequential) or hasattr(layer, "_run_through_graph")


def operations(model: keras.Model) -> list[keras.Operation]:
    """The model's layers, and its operations that are no layers, in topological order; inputs left out."""
    listed = model.layers if isinstance(model, keras.Sequential) else model.operations
    return [operation for operation in listed if not isinstance(operation, keras.layers.InputLayer)]


def stem(layer: keras.Operation) -> str:
    """What Keras' automatic names of the layer's class begin with."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", type(layer).__name__)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()


def _is_automatic(layer: keras.Operation) -> bool:
    return re.fullmatch(rf"{stem(layer)}(_\d+)?", layer.name) is not None
