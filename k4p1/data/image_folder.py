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
    `valid/`) and `test/`, each name in upper or lower case.

    Labels are the class folders in alphabetical order, images in the order of their paths.

    `train/` is the training split where it holds folders of images and nothing else is beside it but other splits. Where it
    holds images itself and other folders of images are beside it, it is a class like them.

    Args:
      root: the folder.

    Raises:
      DataError: missing, empty, fewer than two classes, or folders of which it cannot be told whether they are splits.
    """

    def __init__(self, root: str | pathlib.Path):
        root = pathlib.Path(root).expanduser()
        self.name = str(root)
        if not root.is_dir():
            raise errors.DataError(f"no image folder {root}")
        files = {split: _images_by_class(folder) for split, folder in _split_folders(root).items()}
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


def _split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folder of each split; that of `train` is `root` itself where its folders are classes.

    Raises:
      DataError: two folders for one split, or folders that are neither clearly splits nor clearly classes.
    """
    named: dict[str, pathlib.Path] = {}
    for folder in _folders(root):
        split = _SPLITS.get(folder.name.lower())
        if split in named:
            raise errors.DataError(
                f"image folder {root} has {named[split].name}/ and {folder.name}/, both for its {split} split; keep one"
            )
        if split:
            named[split] = folder
    train = named.get("train")
    if train is None:
        return {"train": root}
    others = [folder.name for folder in _folders(root) if folder not in named.values() and _has_images(folder)]
    holds_classes = any(map(_has_images, _folders(train)))
    holds_images = any(map(_is_image, train.iterdir()))
    if others and holds_images and not holds_classes:
        return {"train": root}
    if others and (holds_classes or holds_images):
        raise errors.DataError(
            f"image folder {root} has {train.name}/, which holds folders of images like a split, and beside it "
            f"{others[0]}/, which is no split; if '{train.name}' is a class, put its images right into {train}, else move "
            f"{others[0]}/ into it, or away"
        )
    if holds_images and not holds_classes:
        raise errors.DataError(
            f"image folder {root} has images in {train.name}/ without folders of classes; expected {train}/<class>/<image>"
        )
    return named


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: pathlib.Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _has_images(folder: pathlib.Path) -> bool:
    return any(map(_is_image, folder.rglob("*")))


def _images_by_class(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    found = {path.name: sorted(filter(_is_image, path.rglob("*"))) for path in _folders(folder)}
    return {name: paths for name, paths in found.items() if paths}


def _can_decode(path: str) -> bool:
    try:
        preprocessing.decode(tf.io.read_file(path))
    except tf.errors.OpError:
        return False
    return True
