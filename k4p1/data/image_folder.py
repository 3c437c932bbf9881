"""A folder of images: `class/*.jpg`, or `split/class/*.jpg`."""

import pathlib

import tensorflow as tf

from k4p1 import errors
from k4p1.data import preprocessing
from k4p1.data.source import Source

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


class ImageFolder(Source):
    """Images in one folder per class; class folders may be below `train/`, `validation/` (or `val/`,
    `valid/`) and `test/`.

    Labels are the class folders in alphabetical order, images in the order of their paths.

    Args:
      root: the folder.

    Raises:
      DataError: missing, empty, or fewer than two classes.
    """

    def __init__(self, root: str | pathlib.Path):
        root = pathlib.Path(root).expanduser()
        self.name = str(root)
        if not root.is_dir():
            raise errors.DataError(f"no image folder {root}")
        split_folders = {split: root / folder for folder, split in _SPLITS.items() if (root / folder).is_dir()}
        if "train" not in split_folders:
            split_folders = {"train": root}
        files = {split: _images_by_class(folder) for split, folder in split_folders.items()}
        self.labels = tuple(sorted(set().union(*files.values())))
        if not self.labels:
            raise errors.DataError(
                f"image folder {root} has no images; expected {root}/<class>/<image> with {', '.join(SUFFIXES)}"
            )
        if len(self.labels) < 2:
            raise errors.DataError(f"image folder {root} has one class, '{self.labels[0]}'; a classifier needs two or more")
        number = {label: index for index, label in enumerate(self.labels)}
        self._files = {
            split: [(str(path), number[label]) for label in sorted(by_class) for path in by_class[label]]
            for split, by_class in files.items()
        }

    def sizes(self):
        return {split: len(listed) for split, listed in self._files.items()}

    def examples(self, split):
        paths, labels = zip(*self._files[split], strict=True)
        listed = tf.data.Dataset.from_tensor_slices({"path": list(paths), "label": tf.constant(labels, tf.int64)})
        return listed.map(
            lambda example: {"image": tf.io.read_file(example["path"]), "label": example["label"]},
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    def corrupt(self, split):
        return [path for path, _ in self._files[split] if not _can_decode(path)]


def _images_by_class(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    classes = {p.name: p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    found = {
        name: sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        for name, path in classes.items()
    }
    return {name: paths for name, paths in found.items() if paths}


def _can_decode(path: str) -> bool:
    try:
        preprocessing.decode(tf.io.read_file(path))
    except tf.errors.OpError:
        return False
    return True
