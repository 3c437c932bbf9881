"""What reads the output of a layer: which convolutions and dense layers are normalised."""

import itertools

import keras

from k4p1.backbones import canonical

NORMALISATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)
"""The layers that normalise and may have a scale and a bias per channel."""


def normalised(model: keras.Model) -> set[int]:
    """The ids of the layers whose linear output a normalisation reads, and nothing else.

    Such an output needs no scale and bias of its own: those of the normalisation come behind it. One with an activation
    does, and so does one that is also read elsewhere, or added to another before it is normalised. A normalisation without
    any variable does not count: a task could own nothing there.

    Args:
      model: functional or sequential; inner models are opened.
    """
    readers: dict[int, list[keras.Operation]] = {}
    linear: set[int] = set()
    for operation, reading in _readers(model, []):
        readers.setdefault(id(operation), []).extend(reading)
        if getattr(operation, "activation", None) in (None, keras.activations.linear):
            linear.add(id(operation))
    return {
        identity
        for identity, reading in readers.items()
        if identity in linear and reading and all(isinstance(r, NORMALISATIONS) and r.weights for r in reading)
    }


def _readers(model: keras.Model, behind: list[keras.Operation]) -> list[tuple[keras.Operation, list[keras.Operation]]]:
    """(operation, what reads it) for every operation of a model that is none itself; `behind` reads the model's output."""
    found = []
    for operation, reading in _direct_readers(model, behind):
        opened = [first for reader in reading for first in _first(reader)]
        found += _readers(operation, opened) if canonical.is_graph(operation) else [(operation, opened)]
    return found


def _direct_readers(model: keras.Model, behind: list[keras.Operation]):
    listed = canonical.operations(model)
    if isinstance(model, keras.Sequential):
        return [(one, [other]) for one, other in itertools.pairwise(listed)] + [(listed[-1], behind)]
    inside = {id(node) for nodes in model._nodes_by_depth.values() for node in nodes}
    last = {id(output._keras_history.operation) for output in model.outputs}
    return [
        (
            operation,
            [node.operation for node in operation._outbound_nodes if id(node) in inside]
            + (behind if id(operation) in last else []),
        )
        for operation in listed
    ]


def _first(operation: keras.Operation) -> list[keras.Operation]:
    """The operation itself, or what reads the input of an inner model."""
    if not canonical.is_graph(operation):
        return [operation]
    if isinstance(operation, keras.Sequential):
        return _first(canonical.operations(operation)[0])
    inside = {id(node) for nodes in operation._nodes_by_depth.values() for node in nodes}
    inputs = [layer for layer in operation.operations if isinstance(layer, keras.layers.InputLayer)]
    reading = [node.operation for layer in inputs for node in layer._outbound_nodes if id(node) in inside]
    return [first for reader in reading for first in _first(reader)]
