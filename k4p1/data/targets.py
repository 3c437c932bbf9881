"""What a task learns from an example, beside its image: the fields it reads, and the targets they become."""

import abc
from collections.abc import Mapping

import tensorflow as tf

Fields = Mapping[str, tf.Tensor]
SAMPLE_WEIGHT = "sample_weight"
"""Field of a source, and name in a batch: how much an example counts in the training loss, 1 where it is not there."""


class Targets(abc.ABC):
    """Turns the fields of an example into targets, tensors of fixed shape that a batch holds by name.

    Attributes:
      fields: names of the fields that it reads; a source must have them (`Source.fields`).
      maps: names of targets that are images (height, width, channels) in register with the input: augmentations that move
        the image move them, and they are resized with it, to the nearest value.
    """

    fields: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()

    def check(self, fields: Fields, source: str) -> Fields:
        """The fields, with assertions on what no image of the data set may have; runs for every example, first."""
        return fields

    @abc.abstractmethod
    def read(self, fields: Fields) -> dict[str, tf.Tensor]:
        """The targets; an example for which this fails counts as one that cannot be read."""

    @abc.abstractmethod
    def blank(self, fields: Fields, size: tuple[int, int]) -> dict[str, tf.Tensor]:
        """Targets of the same shapes and types for an example of (height, width) that cannot be read; its weight is 0."""


class ClassLabel(Targets):
    """`label`, int64 scalar, the number of a class.

    Args:
      classes: labels must be below it.
    """

    fields = ("label",)

    def __init__(self, classes: int):
        self._classes = classes

    def check(self, fields, source):
        label = tf.cast(fields["label"], tf.int64)
        message = f"{source}: label out of range; allowed are 0 to {self._classes - 1}, got:"
        with tf.control_dependencies([tf.debugging.Assert((label >= 0) & (label < self._classes), [message, label])]):
            return {"label": tf.identity(label)}

    def read(self, fields):
        return {"label": fields["label"]}

    def blank(self, fields, size):
        return {"label": fields["label"]}


class WithSampleWeight(Targets):
    """Targets, and the `sample_weight` of the example, a float scalar.

    Args:
      targets: the others.
    """

    def __init__(self, targets: Targets):
        self._targets = targets
        self.fields, self.maps = (*targets.fields, SAMPLE_WEIGHT), targets.maps

    def check(self, fields, source):
        weight = tf.cast(fields[SAMPLE_WEIGHT], tf.float32)
        return {**self._targets.check(_others(fields), source), SAMPLE_WEIGHT: weight}

    def read(self, fields):
        return {**self._targets.read(_others(fields)), SAMPLE_WEIGHT: fields[SAMPLE_WEIGHT]}

    def blank(self, fields, size):
        return {**self._targets.blank(_others(fields), size), SAMPLE_WEIGHT: fields[SAMPLE_WEIGHT]}


def _others(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if name != SAMPLE_WEIGHT}
