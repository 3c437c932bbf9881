"""Data that a program has in its hands: arrays, `tf.data` and Keras data sets.

A split is one of

* `(images, labels)` or `(images, labels, sample_weights)`: arrays, see `Arrays`;
* a `tf.data.Dataset` of such pairs or triples, or of `{"image": ..., "label": ..., "sample_weight": ...}`, one example or
  one batch at a time;
* a `keras.utils.PyDataset` of batches of such pairs or triples.

Labels are whole numbers, one-hot vectors or names; names of numbers are the data set's `class_names`, else the numbers. Data
is `{split: one of these}` for `train`, `validation` and `test`, or one of these alone, which is then `train`. Data sets are
read once, when a run begins, and kept in memory; their own shuffling and augmentation are so frozen, and belong into
`Task(augment=...)`.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.data.arrays import Arrays
from k4p1.data.source import Source
from k4p1.data.targets import SAMPLE_WEIGHT

_LARGEST = 8 << 30
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
_EXPECTED = (
    "a name, a folder, a Source, (images, labels), a tf.data.Dataset or keras.utils.PyDataset of such pairs, or {'train': "
    "one of these, ...}"
)


def as_source(data: Any) -> Source:
    """The source of data that is no name; data sets are not read yet.

    Raises:
      DataError: nothing of the above; says what was given.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, Mapping):
        for split, part in data.items():
            if split not in _SPLITS:
                raise errors.DataError(errors.unknown("split of data", str(split), ("train", "validation", "test")))
            _check(part, f"data['{split}']")
        if "train" not in data:
            raise errors.DataError(f"data has no split 'train'; it has: {', '.join(data) or 'none'}")
        return PythonData({_SPLITS[split]: part for split, part in data.items()})
    _check(data, "data")
    return PythonData({"train": data})


class PythonData(Source):
    """Splits as they are in a program; read when the first of it is asked for.

    Args:
      splits: see the module.
      name: for messages.
    """

    def __init__(self, splits: Mapping[str, Any], name: str = "task"):
        self._given, self.name = dict(splits), name
        if all(isinstance(part, (tuple, list)) for part in splits.values()):
            self._read  # noqa: B018  arrays are at hand: what is wrong with them is told at once

    def __repr__(self) -> str:
        return f"PythonData({', '.join(self._given)})"

    @functools.cached_property
    def _read(self) -> tuple[Source, Mapping[str, np.ndarray]]:
        columns = {split: _columns(part, f"data['{split}']") for split, part in self._given.items()}
        names = next((tuple(part.class_names) for part in self._given.values() if getattr(part, "class_names", None)), None)
        if all(labels.dtype.kind in "SUO" for _, labels, _ in columns.values()):  # names in place of numbers
            given_names = {split: np.array([_text(one) for one in labels]) for split, (_, labels, _) in columns.items()}
            names = tuple(np.unique(np.concatenate(list(given_names.values()))))
            columns = {s: (one[0], np.searchsorted(names, given_names[s]), one[2]) for s, one in columns.items()}
        labels = {split: _numbers(labels, f"data['{split}']") for split, (_, labels, _) in columns.items()}
        most = 1 + max((int(found.max()) for found in labels.values() if found.size), default=0)
        images = {split: (one, labels[split]) for split, (one, _, _) in columns.items()}
        arrays = Arrays(images, names or tuple(map(str, range(most))), name="data")
        seen = np.bincount(images["train"][1].astype(np.int64), minlength=len(arrays.labels))
        if missing := [label for label, count in zip(arrays.labels, seen, strict=True) if not count]:
            shown = [*missing[:5], *(["..."] if missing[5:] else [])]
            print(f"data: no image to train on of {len(missing)} classes: {', '.join(shown)}")
        given = {split: weights for split, (_, _, weights) in columns.items() if weights is not None}
        weights = {}
        if given:
            weights = {split: given.get(split, np.ones(len(labels[split]), np.float32)) for split in columns}
        for split, one in weights.items():
            if one.shape != labels[split].shape or not np.all(np.isfinite(one) & (one >= 0)):
                raise errors.DataError(
                    f"data['{split}']: sample weights are {one.shape}, {one.dtype}; expected one number of at least 0 "
                    "per image"
                )
        return arrays, weights

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names."""
        return self._read[0].labels

    @property
    def fields(self) -> tuple[str, ...]:
        """What examples hold beside the image."""
        return ("label", SAMPLE_WEIGHT) if self._read[1] else ("label",)

    def sizes(self):
        return self._read[0].sizes()

    def examples(self, split):
        arrays, weights = self._read
        examples = arrays.examples(split)
        if not weights:
            return examples
        both = tf.data.Dataset.zip(examples, tf.data.Dataset.from_tensor_slices(weights[split].astype(np.float32)))
        return both.map(lambda example, weight: {**example, SAMPLE_WEIGHT: weight})


def _text(label: Any) -> str:
    return label.decode() if isinstance(label, bytes) else str(label)


def _check(part: Any, what: str) -> None:
    """Raises DataError unless a part can be a split, as far as is seen without reading it."""
    if isinstance(part, (tf.data.Dataset, keras.utils.PyDataset)):
        return
    if isinstance(part, (tuple, list)) and len(part) in (2, 3):
        return
    given = f"{type(part).__name__} of {len(part)}" if isinstance(part, (tuple, list)) else type(part).__name__
    raise errors.DataError(f"{what} is a {given}; expected {_EXPECTED}")


def _columns(part: Any, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Images, labels and weights of a split as arrays."""
    if isinstance(part, (tuple, list)):
        weights = np.asarray(part[2], np.float32) if len(part) == 3 else None
        return np.asarray(part[0]), np.asarray(part[1]), weights
    collected: list[list[np.ndarray]] = [[], [], []]
    size, shape = 0, None
    for example in _examples(part, what):
        image, *others = (np.asarray(one) for one in example)
        is_batch = image.ndim == 4
        columns = [image, *others] if is_batch else [one[None] for one in (image, *others)]
        if columns[0].ndim != 4:
            raise errors.DataError(
                f"{what}: images are {image.shape}; expected (height, width, channels), or a batch of them"
            )
        shape = shape or columns[0].shape[1:]
        if columns[0].shape[1:] != shape:
            raise errors.DataError(
                f"{what}: images have several sizes ({shape}, {columns[0].shape[1:]}); resize them, such as with "
                "dataset.map(lambda image, label: (tf.image.resize(image, (96, 96)), label)), or give a folder of images"
            )
        size += columns[0].nbytes
        if size > _LARGEST:
            raise errors.DataError(
                f"{what}: more than {_LARGEST >> 30} GiB of images, and data sets are kept in memory; give a folder of "
                "images, a TFDS data set, or a k4p1.data.Source"
            )
        for column, values in zip(collected, columns, strict=False):
            column.append(values)
    if not collected[0]:
        raise errors.DataError(f"{what} holds no examples")
    images, labels, weights = (np.concatenate(column) if column else None for column in collected)
    return images, labels, weights


def _examples(part: Any, what: str) -> Iterator[Sequence[Any]]:
    for example in _elements(part, what):
        if isinstance(example, Mapping):
            named = [example.get(name) for name in ("image", "label", SAMPLE_WEIGHT)]
            example = tuple(one for one in named if one is not None)
        if not isinstance(example, (tuple, list)) or len(example) not in (2, 3):
            raise errors.DataError(f"{what}: an element is a {type(example).__name__}; expected (image, label)")
        yield example


def _elements(part: Any, what: str) -> Iterable[Any]:
    if isinstance(part, keras.utils.PyDataset):
        number = part.num_batches
        if number is None:
            raise errors.DataError(f"{what}: a PyDataset without end; give it a length (num_batches)")
        return (part[i] for i in range(number))
    if part.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise errors.DataError(f"{what}: a data set without end; leave out repeat()")
    return part.as_numpy_iterator()


def _numbers(labels: np.ndarray, what: str) -> np.ndarray:
    """Labels (n,), of one-hot vectors their largest value's place."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        return labels[:, 0]
    if labels.ndim == 2:
        if not (np.all((labels == 0) | (labels == 1)) and np.all(labels.sum(axis=1) == 1)):
            raise errors.DataError(
                f"{what}: labels are {labels.shape}; expected numbers of classes (n,), or one-hot vectors"
            )
        return labels.argmax(axis=1)
    return labels
