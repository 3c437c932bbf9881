"""Files that are whole or not there: written beside, then renamed."""

import contextlib
import errno
import json
import os
import pathlib
import secrets
from collections.abc import Iterator

from k4p1 import errors


@contextlib.contextmanager
def written_atomically(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to; renames it to `path` when all went well, removes it otherwise.

    Raises:
      StorageError: no space, no permission or a missing folder; one line that says which.
    """
    path = pathlib.Path(path)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f".{path.name}.{secrets.token_hex(6)}.partial"
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the system applies the umask
        partial = beside
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise storage_error(path, e) from e
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file atomically."""
    with written_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | pathlib.Path, value: object) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def storage_error(path: str | pathlib.Path, e: OSError) -> errors.K4p1Error:
    """The one-line error for a failed write to `path`."""
    if isinstance(e, errors.K4p1Error):
        return e
    reason = {
        errno.ENOSPC: "no space left on the disk",
        errno.EDQUOT: "the disk quota is used up",
        errno.EACCES: "no write permission",
        errno.EPERM: "no write permission",
        errno.EROFS: "the file system is read-only",
        errno.EEXIST: "a part of the path is a file, not a folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
    }.get(e.errno, e.strerror or str(e))
    return errors.StorageError(f"cannot write {path}: {reason}")
