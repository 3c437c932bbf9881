"""Views: layers that have the variables of others, and nodes and names of their own.

Neither a user's layer nor one of a backbone is ever called by what is built on it, so that nothing grows, and nothing is
renamed, with the networks and tasks that share it.
"""

from typing import Any

import keras

from k4p1.backbones import canonical

_BOUND_TO_ORIGINAL = ("build", "quantize")  # wrapped by Keras for one object; a built layer needs neither
_STATISTICS = ("moving_mean", "moving_variance", "momentum")
_NO_PARTS = ("_inbound_nodes", "_outbound_nodes", "_tracker")


def view(layer: keras.Operation, batch_normalise: bool) -> keras.Operation:
    """The same layer for another model.

    Args:
      layer: a built layer; where it is composed of others with a batch normalisation among them, they are viewed, too.
      batch_normalise: whether a BatchNormalization follows `training=` (True), or always uses its moving statistics.
    """
    return _twin(layer, batch_normalise, {})


def normalisations(layer: keras.Operation) -> list[keras.layers.Layer]:
    """The batch normalisations that a layer consists of, itself included: Keras' own, and layers of the same statistics."""
    parts = layer._flatten_layers() if isinstance(layer, keras.layers.Layer) else ()
    return [part for part in parts if all(hasattr(part, name) for name in _STATISTICS)]


def _twin(layer: keras.Operation, batch_normalise: bool, made: dict[int, Any]) -> Any:
    if id(layer) in made:
        return made[id(layer)]
    twin = made[id(layer)] = object.__new__(type(layer))
    twin.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in _BOUND_TO_ORIGINAL})
    if getattr(layer, "_layers", None) and normalisations(layer):
        for name, value in layer.__dict__.items():
            if name not in (*_NO_PARTS, *_BOUND_TO_ORIGINAL):
                twin.__dict__[name] = _with_twins(value, batch_normalise, made)
    twin.__dict__.update(_inbound_nodes=[], _outbound_nodes=[], _trainable=batch_normalise)
    return twin


def _with_twins(value: Any, batch_normalise: bool, made: dict[int, Any]) -> Any:
    """What a composite layer holds, its sublayers replaced."""
    if isinstance(value, keras.layers.Layer):
        if canonical.is_graph(value) and value.built and id(value) not in made:
            made[id(value)] = keras.models.clone_model(
                value, clone_function=lambda layer: _twin(layer, batch_normalise, made), recursive=True
            )
        return _twin(value, batch_normalise, made)
    if isinstance(value, dict):
        found = {key: _with_twins(one, batch_normalise, made) for key, one in value.items()}
        return found if any(found[key] is not one for key, one in value.items()) else value
    if isinstance(value, list) or type(value) is tuple:
        listed = [_with_twins(one, batch_normalise, made) for one in value]
        changed = any(one is not other for one, other in zip(listed, value, strict=True))
        return (tuple(listed) if isinstance(value, tuple) else listed) if changed else value
    return value
