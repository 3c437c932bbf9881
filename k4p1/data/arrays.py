"""Images in memory, and the data that comes with the package's dependencies."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.data.source import Source


class Arrays(Source):
    """Images and labels as arrays.

    Args:
      splits: split name to (images, labels): images (n, height, width, 1 or 3) of 0 to 255, or
        floats of 0 to 1, labels (n,) integers.
      labels: class names.
      name: for messages.

    Raises:
      DataError: shapes that do not fit, or a label out of range.
    """

    def __init__(self, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: Sequence[str], name: str = "arrays"):
        self.name, self.labels = name, tuple(map(str, labels))
        self._splits = {}
        for split, (images, numbers) in splits.items():
            images, numbers = np.asarray(images), np.asarray(numbers, np.int64)
            if images.ndim != 4 or images.shape[-1] not in (1, 3) or numbers.shape != images.shape[:1]:
                raise errors.DataError(
                    f"{name}/{split}: expected images (n, height, width, 1 or 3) and labels (n,); "
                    f"got {images.shape}, {numbers.shape}"
                )
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self.labels):
                raise errors.DataError(
                    f"{name}/{split}: labels go from {numbers.min()} to {numbers.max()}, "
                    f"allowed are 0 to {len(self.labels) - 1}"
                )
            if np.issubdtype(images.dtype, np.floating) and images.size and 0 <= images.min() <= images.max() <= 1:
                print(f"{name}/{split}: float images of 0 to 1 are taken for 0 to 255")
                images = np.round(255 * images)
            images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
            self._splits[split] = np.clip(images, 0, 255).astype(np.uint8), numbers

    def sizes(self):
        return {split: len(labels) for split, (_, labels) in self._splits.items()}

    def examples(self, split):
        images, labels = self._splits[split]
        return tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})


EMBEDDED = {
    "digits": ("the digit", tuple("0123456789"), lambda digit: digit),
    "parity": ("whether it is even or odd", ("even", "odd"), lambda digit: digit % 2),
}
"""Name, question, labels and rule of each embedded task."""


def embedded(name: str) -> Arrays:
    """1,797 handwritten digits, 8 x 8 grey pixels, that come with scikit-learn: no download.

    The images are those of the test part of the UCI "Optical Recognition of Handwritten Digits" set. A fifth, drawn once and
    for all, is the test split.

    Args:
      name: `digits` (ten classes) or `parity` (even or odd: another question to the same images).

    Raises:
      DataError: unknown name.
    """
    if name not in EMBEDDED:
        raise errors.DataError(errors.unknown("embedded data set", name, EMBEDDED))
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    _, labels, rule = EMBEDDED[name]
    numbers = rule(digits.target)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    splits = {split: (images[chosen], numbers[chosen]) for split, chosen in (("train", train), ("test", test))}
    return Arrays(splits, labels, name=f"embedded/{name}")
