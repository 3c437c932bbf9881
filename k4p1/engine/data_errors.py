"""Failures of an input pipeline as one line for the person who gave the data."""

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from k4p1 import errors

_FILE = re.compile(r"(?:^|: |\}\} )((?:(?!: |\}\} ).)+); (No such file or directory|Permission denied)")
"""The file in what TensorFlow says of one that it cannot open."""


@contextlib.contextmanager
def data_errors(task: str, worker: int | None = None) -> Iterator[None]:
    """Within it, what TensorFlow raises while batches are read and used becomes a `DataError` that names task and worker."""
    where = f"task '{task}'" + ("" if worker is None else f" on worker {worker}")
    try:
        yield
    except tf.errors.InvalidArgumentError as e:
        raise errors.DataError(f"{where}: {_message(str(e))}") from e
    except (tf.errors.NotFoundError, tf.errors.PermissionDeniedError) as e:
        file = _FILE.search(str(e).splitlines()[0])
        if file is None:
            raise
        raise errors.DataError(f"{where}: cannot read {file[1]}: {file[2]}; it was there when the run began") from e
    except tf.errors.DataLossError as e:
        raise errors.DataError(f"{where}: its data is damaged ({str(e).splitlines()[0][:160]})") from e


def _message(text: str) -> str:
    if "label out of range" in text and "assertion failed:" in text:
        text = text[text.index("assertion failed:") :].removeprefix("assertion failed:").strip()
        return text.splitlines()[0].strip(" []")[:200]
    return text.splitlines()[0][:200]
