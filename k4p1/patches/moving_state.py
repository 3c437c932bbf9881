"""What layers assign to while they train, other than the statistics of batch normalisation that the engine moves."""

import keras

from k4p1 import errors
from k4p1.backbones.backbone import learned_variables
from k4p1.patches.patched_layer import PatchedLayer

_KNOWN = (keras.layers.BatchNormalization, keras.layers.Normalization)


def check(name: str, layer: keras.Operation, moved: set[int]) -> None:
    """Makes sure that a layer of a task model changes nothing in training but what the engine moves for it.

    Args:
      name: canonical.
      layer: as the task model calls it.
      moved: ids of the variables whose role is `statistics`.

    Raises:
      PatchError: it assigns to another variable, which would be lost, or move what the tasks share.
    """
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, (PatchedLayer, *_KNOWN)):
        return
    learned = learned_variables(layer)
    if all(id(v) in learned for v in layer.variables if keras.backend.is_float_dtype(v.dtype)):
        return  # it has no state that could move
    for variable in _assigned(layer):
        if id(variable) not in moved:
            raise errors.PatchError(
                f"layer '{name}' ({type(layer).__name__}) changes its variable '{variable.name}' while it trains; of the "
                "values that forward passes change only the statistics of batch normalisation can be kept per task or "
                "frozen. Take the layer out of the network"
            )


def _assigned(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The float variables that a call in training assigns to; nothing is computed, and no value changes."""
    floats = [v for v in layer.variables if keras.backend.is_float_dtype(v.dtype)]
    found: list[keras.Variable] = []

    class InTraining(keras.Operation):
        def call(self, *args, **kwargs):
            if layer._call_has_training_arg:  # a functional model overrides what the call within it said
                kwargs["training"] = True
            with keras.StatelessScope() as scope:
                outputs = layer(*args, **kwargs)
                found.extend(v for v in floats if scope.get_current_value(v) is not None)
            return outputs

    for node in layer._inbound_nodes[:1]:
        InTraining().compute_output_spec(*node.arguments.args, **node.arguments.kwargs)
    return found
