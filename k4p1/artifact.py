"""Files that are whole or not there: safetensors with a content hash, and atomic writing of any file."""

import contextlib
import errno
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import safetensors
import safetensors.numpy

from k4p1 import content_hash, errors


@contextlib.contextmanager
def written_atomically(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path to write to; renames it to `path` when all went well, removes it otherwise.

    Raises:
      StorageError: no space, no permission or a missing folder; one line that says which.
    """
    path = pathlib.Path(path)
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        beside = pathlib.Path(name)
        yield beside
        os.chmod(beside, 0o666 & ~_umask())
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as e:
        raise storage_error(path, e) from e
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a text file atomically."""
    with written_atomically(path) as beside:
        beside.write_text(text, encoding="utf-8")


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


def write(
    path: str | pathlib.Path, kind: str, version: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file whose metadata names its format, version and content hash; atomically."""
    tensors = {name: np.array(value, order="C") for name, value in tensors.items()}
    header = {**metadata, "format": kind, "version": str(version)}
    header["content_hash"] = content_hash.digest(tensors, header)
    content = safetensors.numpy.save(tensors, metadata=header)
    with written_atomically(path) as beside:
        beside.write_bytes(content)


def read(path: str | pathlib.Path, kind: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads and checks a file that `write` made: (tensors, metadata).

    Raises:
      ArtifactError: missing, no safetensors file, another format or version, or damaged (the content hash differs).
    """
    tensors, header = _read_unchecked(pathlib.Path(path))
    if header.get("format") != kind:
        raise errors.ArtifactError(f"{path} is no {kind} file (format: {header.get('format', 'unknown')})")
    if header.get("version") != str(version):
        raise errors.ArtifactError(f"{path} has version {header.get('version')} of {kind}; this k4p1 reads {version}")
    claimed = header.pop("content_hash", "")
    found = content_hash.digest(tensors, header)
    if claimed != found:
        raise errors.ArtifactError(f"{path} is damaged: its content hash is {found[:12]}, it says {claimed[:12] or 'none'}")
    return tensors, header


def check_fit(what: str, shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, np.ndarray]) -> None:
    """Makes sure that `tensors` has exactly the names and shapes of `shapes`.

    Raises:
      ArtifactError: it has not; says what differs.
    """
    missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or extra:
        parts = [
            f"{len(names)} {word} (first: {names[0]})" for names, word in ((missing, "missing"), (extra, "unknown")) if names
        ]
        raise errors.ArtifactError(f"tensors do not fit {what}: {', '.join(parts)}")
    for key, shape in shapes.items():
        if tuple(shape) != tensors[key].shape:
            raise errors.ArtifactError(
                f"tensor '{key}' does not fit {what}: its shape is {tensors[key].shape}, wanted {tuple(shape)}"
            )


def read_header(path: str | pathlib.Path) -> dict[str, str]:
    """The metadata of a safetensors file, unchecked.

    Raises:
      ArtifactError: missing or no safetensors file.
    """
    return _guarded(pathlib.Path(path), lambda f: f.metadata() or {})


def _read_unchecked(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    return _guarded(path, lambda f: ({key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}))  # noqa: SIM118


def _guarded(path: pathlib.Path, reading: Callable):
    if not path.is_file():
        raise errors.ArtifactError(f"no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as f:
            return reading(f)
    except PermissionError as e:
        raise errors.ArtifactError(f"cannot read {path}: no permission") from e
    except (safetensors.SafetensorError, ValueError, OSError, KeyError, TypeError, AttributeError) as e:
        raise errors.ArtifactError(f"{path} is damaged or no safetensors file ({str(e).splitlines()[0][:100]})") from e


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
