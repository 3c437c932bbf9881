"""Tensor files: safetensors with format, version and a content hash, written atomically."""

import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import safetensors
import safetensors.numpy

from k4p1 import errors
from k4p1.files import content_hash
from k4p1.files.atomic import written_atomically


def write(
    path: str | pathlib.Path, format_name: str, version: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file whose metadata names its format, version and content hash; atomically."""
    tensors = {name: np.array(value, order="C") for name, value in tensors.items()}
    header = {**metadata, "format": format_name, "version": str(version)}
    header["content_hash"] = content_hash.digest(tensors, header)
    content = safetensors.numpy.save(tensors, metadata=header)
    with written_atomically(path) as partial:
        partial.write_bytes(content)


def read(path: str | pathlib.Path, format_name: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads and checks a file that `write` made: (tensors, metadata).

    Raises:
      ArtifactError: missing, no safetensors file, another format or version, or damaged (the content hash differs).
    """
    tensors, header = _read_unchecked(pathlib.Path(path))
    if header.get("format") != format_name:
        raise errors.ArtifactError(f"{path} is no {format_name} file (format: {header.get('format', 'unknown')})")
    if header.get("version") != str(version):
        raise errors.ArtifactError(f"{path} has version {header.get('version')} of {format_name}; this k4p1 reads {version}")
    claimed = header.pop("content_hash", "")
    found = content_hash.digest(tensors, header)
    if claimed != found:
        raise errors.ArtifactError(f"{path} is damaged: its content hash is {found[:12]}, it says {claimed[:12] or 'none'}")
    return tensors, header


def check_values(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray], bits: str | None = None) -> None:
    """Makes sure that tensors hold parameters: finite floats, variances of at least 0, or bytes of bits.

    Args:
      path: of the file.
      tensors: by name, `.../variable`.
      bits: the variable that holds bits, if any may.

    Raises:
      ArtifactError: other values; names the tensor.
    """
    for name, value in tensors.items():
        if bits is not None and name.rpartition("/")[2] == bits:
            if value.dtype != np.uint8:
                raise errors.ArtifactError(f"{path}: tensor '{name}' is {value.dtype}; expected uint8 bits")
        elif not _is_float(value):
            raise errors.ArtifactError(f"{path}: tensor '{name}' is {value.dtype}; expected float32")
        elif (wrong := _wrong_values(name, value)) is not None:
            raise errors.ArtifactError(f"{path}: tensor '{name}' {wrong}")


def check_before_writing(what: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises DivergedError where `check_values` would refuse the values once they are in a file."""
    for name, value in tensors.items():
        if _is_float(value) and (wrong := _wrong_values(name, value)) is not None:
            raise errors.DivergedError(f"{what}: '{name}' {wrong}; not written")


def _is_float(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16"


def _wrong_values(name: str, value: np.ndarray) -> str | None:
    if not np.all(np.isfinite(value)):
        return "holds values that are not finite"
    if name.endswith("moving_variance") and value.size and np.min(value) < 0:
        return "holds a negative variance"
    return None


def check_fit(
    what: str,
    shapes: Mapping[str, Sequence[int]],
    tensors: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Makes sure that `tensors` has exactly the names and shapes of `shapes`, and the types of `dtypes` if given.

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
                f"tensor '{key}' does not fit {what}: its shape is {tensors[key].shape}, expected {tuple(shape)}"
            )
        if dtypes is not None and tensors[key].dtype.name != dtypes[key]:
            raise errors.ArtifactError(
                f"tensor '{key}' does not fit {what}: its type is {tensors[key].dtype}, expected {dtypes[key]}"
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
    if path.is_dir():
        raise errors.ArtifactError(f"{path} is a folder; expected a file")
    if not path.is_file():
        raise errors.ArtifactError(f"no file {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as f:
            return reading(f)
    except PermissionError as e:
        raise errors.ArtifactError(f"cannot read {path}: no permission") from e
    except (safetensors.SafetensorError, ValueError, OSError, KeyError, TypeError, AttributeError) as e:
        raise errors.ArtifactError(f"{path} is damaged or no safetensors file ({str(e).splitlines()[0][:100]})") from e
