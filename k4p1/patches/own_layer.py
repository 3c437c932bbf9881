"""Layers of a task's own, which stand for no layer of the backbone."""

import keras

from k4p1.patches.patched_layer import FIXED, STATISTICS, TRAINED, PrivateVariable


class OwnLayer(keras.layers.Layer):
    """A layer that one task owns; it stands beside those of the backbone.

    Attributes:
      kind: the patch kind that made it.
      momentum: of its moving statistics, where it has any.
      recalibrated: whether population statistics replace these after training.
    """

    kind: str = ""
    momentum: float = 0.99
    recalibrated: bool = True

    def private_variables(self) -> list[PrivateVariable]:
        """Its variables; moving statistics by their names."""
        floats = [v for v in self.variables if keras.backend.is_float_dtype(v.dtype)]
        return [PrivateVariable(self.kind, v.name, v, _role(v)) for v in floats]

    def folded(self) -> keras.layers.Layer:
        """A built plain Keras layer, or model, that computes the same at inference."""
        raise TypeError(f"{type(self).__name__} cannot be folded")

    def multiply_adds(self, positions: int) -> int:
        """Of one image; `positions` are height times width put out."""
        return 0


def _role(variable: keras.Variable) -> str:
    if variable.trainable:
        return TRAINED
    return STATISTICS if variable.name.startswith("moving_") else FIXED
