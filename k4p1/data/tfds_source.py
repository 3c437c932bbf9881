"""Data sets of TensorFlow Datasets: by name, or prepared in a directory."""

import difflib
import pathlib

from k4p1 import errors, offline
from k4p1.data.source import Source


class Tfds(Source):
    """A data set of TFDS with an image; its other features are fields, the first class label by the name `label`.

    Where the labels of its test split are hidden (-1, as in `visual_domain_decathlon`), its validation split stands for it.

    Args:
      name: a TFDS name such as `cifar100` or `oxford_flowers102:2.1.1`, or the directory of a prepared data set, the one
        that holds `dataset_info.json`.
      data_dir: where TFDS keeps its data sets; None for its default.
      download: whether TFDS may download and prepare what is missing; None: unless the environment variable K4P1_OFFLINE is
        set, as `--offline` does.

    Raises:
      DataError: unknown or not prepared, or without an image feature.
    """

    def __init__(self, name: str, data_dir: str | None = None, download: bool | None = None):
        import tensorflow_datasets as tfds

        self._tfds, self.name = tfds, name
        path = pathlib.Path(name).expanduser()
        try:
            if (path / "dataset_info.json").is_file():
                self._builder = tfds.builder_from_directory(str(path))
            else:
                self._builder = tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as e:
            close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=3, cutoff=0.6)
            hint = f"; nearest TFDS names: {', '.join(close)}" if close else ""
            raise errors.DataError(f"no data set '{name}': neither embedded, nor a folder, nor known to TFDS{hint}") from e
        except Exception as e:  # TFDS raises many kinds for a damaged directory or version
            raise errors.DataError(f"TFDS cannot open '{name}': {_first_line(e)}") from e
        if not self._builder.info.splits:
            self._prepare(not offline.is_offline() if download is None else download)
        features = self._builder.info.features
        self._image = self._find(features, tfds.features.Image)
        label = next((key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)), None)
        taken = {self._image, "label"} if label is not None else {self._image}
        self._keys = {key: key for key in features if key not in {*taken, label}}
        self._keys |= {"label": label} if label is not None else {}
        self.fields = tuple(self._keys)
        self.labels = tuple(features[label].names) if label else ()
        self._own_names = {name: name for name in self._builder.info.splits}
        if {"test", "validation"} <= set(self._own_names) and self._is_hidden("test"):
            del self._own_names["validation"]
            self._own_names["test"] = "validation"

    def _prepare(self, download: bool) -> None:
        if not download:
            where = pathlib.Path(self._builder.data_dir)
            call = f"tfds.builder({self.name!r}, data_dir=FOLDER).download_and_prepare()"
            raise errors.DataError(
                f"TFDS data set '{self.name}' is not prepared ({where} is missing), and downloads are not allowed; run "
                f"{call} on a machine that may, and copy FOLDER here: give it as data_dir, or TFDS_DATA_DIR"
            )
        try:
            self._builder.download_and_prepare()
        except Exception as e:  # network, disk and checksum errors have no common base
            raise errors.DataError(
                f"TFDS cannot download or prepare '{self.name}': {_first_line(e)}. "
                "Prepare it elsewhere and give its directory"
            ) from e

    def _find(self, features, expected) -> str:
        for key, feature in features.items():
            if isinstance(feature, expected):
                return key
        raise errors.DataError(
            f"TFDS data set '{self.name}' has no {expected.__name__} feature; it has {', '.join(features)}"
        )

    def sizes(self):
        return {name: self._builder.info.splits[own].num_examples for name, own in self._own_names.items()}

    def _is_hidden(self, split: str) -> bool:
        """Whether the first label of a split is below 0."""
        if "label" not in self._keys:
            return False
        read = self._builder.as_dataset(split=f"{split}[:1]", decoders={self._image: self._tfds.decode.SkipDecoding()})
        return any(int(example[self._keys["label"]]) < 0 for example in read)

    def examples(self, split):
        tfds, image, keys = self._tfds, self._image, self._keys
        config = tfds.ReadConfig(try_autocache=False, skip_prefetch=True)
        read = self._builder.as_dataset(
            split=self._own_names[split],
            shuffle_files=False,
            decoders={image: tfds.decode.SkipDecoding()},
            read_config=config,
        )
        return read.map(lambda example: {"image": example[image], **{name: example[key] for name, key in keys.items()}})


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
