"""Finds the source that a name means."""

import pathlib

from k4p1 import errors
from k4p1.data.source import Source


def open_source(data: "str | Source", data_dir: str | None = None) -> Source:
    """The source of `data`.

    Args:
      data: a `Source`, or what `python_data` makes one of; `embedded/digits` or `embedded/parity`; the directory of a
        prepared TFDS data set; a folder of images `class/*.jpg`; or a TFDS name.
      data_dir: where TFDS keeps its data sets.

    Raises:
      DataError: none of these, or it cannot be read.
    """
    if isinstance(data, Source):
        return data
    if not isinstance(data, str):
        from k4p1.data import python_data

        return python_data.as_source(data)
    if not data:
        raise errors.DataError("data is an empty text; give a name, a folder or a Source")
    if data.split("/")[0] == "embedded":
        from k4p1.data import arrays

        return arrays.embedded(data.removeprefix("embedded").lstrip("/"))
    path = pathlib.Path(data).expanduser()
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        from k4p1.data import image_folder

        return image_folder.ImageFolder(path)
    if not path.is_dir() and (path.is_absolute() or data.startswith(".")):
        raise errors.DataError(f"no folder {data}; give a prepared TFDS directory, a folder class/*.jpg, or a TFDS name")
    from k4p1.data import tfds_source

    return tfds_source.Tfds(data, data_dir)
