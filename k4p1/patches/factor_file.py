"""Factor files: the adapter factors beta that tasks share after joint compression (RA, section 3.4)."""

import pathlib

import keras
import numpy as np

from k4p1 import errors
from k4p1.files import content_hash, schema, tensor_file
from k4p1.patches.patched_model import PatchedModel

FORMAT = "k4p1-factors"
VERSION = 1


def save_factors(folder: str | pathlib.Path, patched: PatchedModel, backbone: str) -> str:
    """Writes the factors that a task model shares with others, named by their fingerprint, and returns it.

    Args:
      folder: of factor files.
      patched: a task model with factors beta (C, K), key `layer/kind/beta`.
      backbone: fingerprint of the backbone.
    """
    factors = {key: keras.ops.convert_to_numpy(variable) for key, variable in patched.factors().items()}
    fingerprint = content_hash.digest(factors)
    tensor_file.check_before_writing("the shared factors", factors)
    tensor_file.write(_path(folder, fingerprint), FORMAT, VERSION, factors, {"backbone_fingerprint": backbone})
    return fingerprint


def load_factors(folder: str | pathlib.Path | None, fingerprint: str, backbone: str) -> dict[str, keras.Variable]:
    """The factors with a fingerprint, as variables that task models can share.

    Args:
      folder: of factor files.
      fingerprint: that a patch file refers to.
      backbone: fingerprint of the backbone that they are to be used on.

    Raises:
      ArtifactError: no folder, no file, damaged, other factors under this name, or factors for another backbone.
    """
    if folder is None:
        raise errors.ArtifactError(f"the patch uses shared factors ({fingerprint[:12]}); give the folder of factor files")
    path = _path(folder, fingerprint)
    if not path.is_file():
        raise errors.ArtifactError(f"the patch uses shared factors {fingerprint[:12]}, and there is no file {path}")
    tensors, its_backbone = read_factors(path)
    if content_hash.digest(tensors) != fingerprint:
        raise errors.ArtifactError(f"{path} holds other factors ({content_hash.digest(tensors)[:12]}) than the patch uses")
    if its_backbone != backbone:
        raise errors.ArtifactError(f"{path} is for a backbone with fingerprint {its_backbone[:12]}, not {backbone[:12]}")
    return {key: keras.Variable(value, trainable=False, name=key.rsplit("/", 1)[1]) for key, value in tensors.items()}


def read_factors(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    """The factors of a file by key, and the fingerprint of their backbone.

    Raises:
      ArtifactError: damaged, of another version, or with values, names or fields that no factors have.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, VERSION)
    fields = schema.check(str(path), metadata, {"backbone_fingerprint": schema.HASH})
    tensor_file.check_values(path, tensors)
    for key, value in tensors.items():
        if key.count("/") < 2 or value.ndim != 2:
            raise errors.ArtifactError(f"{path} holds '{key}' of shape {value.shape}; expected layer/kind/beta of two sides")
    return tensors, fields["backbone_fingerprint"]


def factors_fingerprint(patched: PatchedModel) -> str:
    """Hash of the factors that a task model shares with others, or an empty string."""
    factors = {key: keras.ops.convert_to_numpy(variable) for key, variable in patched.factors().items()}
    return content_hash.digest(factors) if factors else ""


def _path(folder: str | pathlib.Path, fingerprint: str) -> pathlib.Path:
    return pathlib.Path(folder) / f"{fingerprint[:16]}.safetensors"
