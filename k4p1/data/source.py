"""What every data source offers: labels, splits, and examples in an order that never changes."""

import abc
from collections.abc import Sequence

import tensorflow as tf


class Source(abc.ABC):
    """Labelled images in named splits.

    `examples(split)` yields dictionaries in the same order each time:

    * `image`: encoded bytes (string scalar), or pixels (height, width, 3) uint8;
    * the source's `fields`, such as `label`, int64 scalar: the number of a class. Maps lie over the image as it is shown,
      turned as the Exif orientation of encoded bytes says.

    Attributes:
      name: for messages.
      labels: class names, in the order of the label numbers.
      fields: what examples hold beside the image.
    """

    name: str
    labels: tuple[str, ...]
    fields: tuple[str, ...] = ("label",)

    @abc.abstractmethod
    def sizes(self) -> dict[str, int]:
        """The number of examples of each split that the source itself has."""

    @abc.abstractmethod
    def examples(self, split: str) -> tf.data.Dataset:
        """The examples of a split, not shuffled, not decoded."""

    def corrupt(self, split: str) -> Sequence[str]:
        """Names of the files of a split that cannot be read; empty where the source has no files of its own."""
        return ()
