"""Images in memory, and the data that comes with the package's dependencies."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.data.source import Source


class Arrays(Source):
    """Images and labels as arrays.

    Args:
      splits: split name to (images, labels): images (n, height, width, 1 or 3), whole numbers or floats of 0 to 255, or
        floats of 0 to 1 in all splits, which are multiplied by 255; labels (n,) whole numbers.
      labels: class names.
      name: for messages.

    Raises:
      DataError: shapes or values that do not fit, or a label out of range.
    """

    def __init__(self, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: Sequence[str], name: str = "arrays"):
        self.name, self.labels = name, tuple(map(str, labels))
        given = {split: (np.asarray(images), np.asarray(numbers)) for split, (images, numbers) in splits.items()}
        for split, (images, numbers) in given.items():
            _check_shapes(f"{name}/{split}", images.shape, numbers.shape)
            if not _are_whole(numbers):
                raise errors.DataError(f"{name}/{split}: labels are {numbers.dtype}; expected whole numbers of classes")
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self.labels):
                raise errors.DataError(
                    f"{name}/{split}: labels go from {numbers.min()} to {numbers.max()}, "
                    f"allowed are 0 to {len(self.labels) - 1}"
                )
            _check_pixels(f"{name}/{split}", images)
        largest = {split: float(images.max()) for split, (images, _) in given.items() if images.size}
        small = {split for split in largest if _is_float(given[split][0]) and largest[split] <= 1}
        of_unit_range = bool(small) and len(small) == len(largest)
        if not of_unit_range and any(largest[split] > 0 for split in small):
            ranges = ", ".join(f"{split} to {value:g}" for split, value in largest.items())
            raise errors.DataError(f"{name}: images go up to different values ({ranges}); give all splits the same range")
        if of_unit_range:
            print(f"{name}: float images of 0 to 1 are multiplied by 255")
        scale = 255 if of_unit_range else 1
        self._splits = {
            split: (_as_rgb(images, scale), numbers.astype(np.int64)) for split, (images, numbers) in given.items()
        }

    def sizes(self):
        return {split: len(labels) for split, (_, labels) in self._splits.items()}

    def examples(self, split):
        images, labels = self._splits[split]
        return tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})


def _check_shapes(what: str, images: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """Raises DataError unless these are shapes of images and of a label for each; says what would mend it."""
    hint = ""
    if len(images) == 3:
        hint = "; one image is images[None]" if images[-1] in (1, 3) else "; grey images are images[..., None]"
    elif len(images) == 4 and images[1] in (1, 3) and images[-1] not in (1, 3):
        hint = "; channels come last: numpy.moveaxis(images, 1, -1)"
    if len(images) != 4 or images[-1] not in (1, 3):
        raise errors.DataError(f"{what}: images are {images}; expected (n, height, width, 1 or 3){hint}")
    if len(labels) != 1:
        raise errors.DataError(f"{what}: labels are {labels}; expected (n,), one class per image")
    if labels != images[:1]:
        raise errors.DataError(f"{what}: {images[0]} images and {labels[0]} labels; expected a label for each image")


def _check_pixels(what: str, images: np.ndarray) -> None:
    """Raises DataError unless images are numbers of 0 to 255."""
    if not (np.issubdtype(images.dtype, np.integer) or _is_float(images)):
        raise errors.DataError(f"{what}: images are {images.dtype}; expected whole numbers or floats of 0 to 255")
    if _is_float(images) and not np.all(np.isfinite(images)):
        raise errors.DataError(f"{what}: {np.sum(~np.isfinite(images)):,} values of the images are NaN or infinite")
    if images.size and not (images.min() >= 0 and images.max() <= 255):
        raise errors.DataError(
            f"{what}: images go from {images.min()} to {images.max()}; scale or clip them to 0 to 255, or floats to 0 to 1"
        )


def _as_rgb(images: np.ndarray, scale: int) -> np.ndarray:
    """uint8 (n, height, width, 3), grey images repeated."""
    if _is_float(images):
        images = np.round(scale * images.astype(np.float32))
    images = images.astype(np.uint8)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _are_whole(numbers: np.ndarray) -> bool:
    is_number = np.issubdtype(numbers.dtype, np.integer) or numbers.dtype == bool
    return is_number or (_is_float(numbers) and bool(np.all(np.isfinite(numbers) & (numbers == np.floor(numbers)))))


def _is_float(images: np.ndarray) -> bool:
    return np.issubdtype(images.dtype, np.floating)


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
