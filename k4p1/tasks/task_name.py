"""The name of a task that was given none: that of its data."""

import pathlib
import re
import unicodedata

from k4p1 import checks, errors
from k4p1.data.source import Source

_VERSION = re.compile(r"\d+(\.(\d+|\*))*")


def name_of_data(data: str | Source) -> str:
    """A task name made of the name of data.

    `embedded/digits` gives `digits`; a folder its own name, that of the data set where it is a version's
    (`oxford_flowers102/2.1.1`); a TFDS name itself without version, `ds/config` as `ds_config`. Characters that a task name
    cannot have become `_`, letters with accents the letters.

    Raises:
      DataError: neither a name nor a source.
    """
    text = data.name if isinstance(data, Source) else data
    if not isinstance(text, str) or not text:
        raise errors.DataError(f"data must be a name, a folder or a Source; got {data!r}")
    path = pathlib.Path(text).expanduser()
    if text.startswith("embedded/"):
        parts = [path.name]
    elif path.is_dir() or path.is_absolute() or text.startswith("."):
        parts = [part for part in path.resolve().parts[1:] if not _VERSION.fullmatch(part)][-1:]
    else:
        parts = [text.partition(":")[0].replace("/", "_")]
    plain = unicodedata.normalize("NFKD", "".join(parts)).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", plain).strip("_.-")
    if name == "shared":  # the shared parameters are called so
        return "shared_data"
    return name if checks.is_task_name(name) else "task"
