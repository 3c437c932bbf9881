"""Backbone files: `backbone.safetensors`, the shared values with what it takes to build the network again."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones import build, input_scaling, structure
from k4p1.backbones.backbone import FILE_FORMAT, FILE_VERSION, Backbone
from k4p1.files import schema, tensor_file

FORMAT, VERSION = FILE_FORMAT, FILE_VERSION
_WIDEST, _DEEPEST = 64.0, 2000

FIELDS = {
    "name": schema.TEXT,
    "config": schema.TEXT,
    "scaling": schema.one_of(input_scaling.SCALINGS),
    "fingerprint": schema.HASH,
    "structure_version": schema.Field(
        "a whole number", lambda value: re.fullmatch("[0-9]{1,6}", value) is not None
    ).or_missing("1"),
    "normalisation": schema.TEXT.or_missing(""),
}
"""The metadata of a backbone file."""

CONFIG_FIELDS = {
    "network": schema.TEXT.or_none(),
    "keras_model": schema.OBJECT.or_none(),
    "width": schema.Field(f"a number up to {_WIDEST:g}", lambda v: schema.NUMBER.holds(v) and 0 < v <= _WIDEST).or_none(),
    "depth": schema.Field(f"a whole number up to {_DEEPEST}", lambda v: schema.COUNT.holds(v) and v <= _DEEPEST).or_none(),
}
"""What `config` names, as JSON: a network with its arguments, or Keras' description of a user's model."""


def save(backbone: Backbone, path: str | pathlib.Path) -> str:
    """Writes the backbone and returns its fingerprint.

    Args:
      backbone: to write.
      path: of the file.

    Raises:
      DivergedError: a value that is not finite, or a negative variance.
    """
    if not isinstance(backbone, Backbone):
        raise errors.ConfigError(f"save_backbone(backbone, path): the first argument is a {type(backbone).__name__}")
    tensors, fingerprint = backbone.tensors(), backbone.fingerprint()
    metadata = {
        "name": backbone.name,
        "config": json.dumps(dict(backbone.config), sort_keys=True),
        "scaling": backbone.scaling,
        "fingerprint": fingerprint,
        "structure_version": str(structure.VERSION),
        **({"normalisation": backbone.normalisation} if backbone.normalisation else {}),
    }
    tensor_file.check_before_writing(f"backbone '{backbone.name}'", tensors)
    tensor_file.write(path, FORMAT, VERSION, tensors, metadata)
    return fingerprint


def load(path: str | pathlib.Path) -> Backbone:
    """Builds the backbone of a file; nothing but the file is opened or downloaded.

    Args:
      path: of a backbone file, or of the folder of a finished run, which has `backbone/backbone.safetensors`.

    Raises:
      ArtifactError: damaged, of another version, or it cannot be built here as it was.
    """
    path = pathlib.Path(path).expanduser()
    path = path / "backbone" / "backbone.safetensors" if path.is_dir() else path
    tensors, fields, config = read(path)
    try:
        backbone = build.from_config(fields["name"], config, fields["scaling"])
    except errors.ArtifactError as e:
        raise errors.ArtifactError(f"{path}: {e}") from e
    except Exception as e:  # Keras raises many kinds on a description that was altered
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise errors.ArtifactError(f"{path}: cannot rebuild backbone '{fields['name']}': {reason}") from e
    backbone.assign(tensors)
    version = int(fields["structure_version"])
    if version != 1 and backbone.fingerprint(version) != fields["fingerprint"]:
        raise errors.ArtifactError(
            f"{path}: Keras {keras.__version__} builds '{backbone.name}' differently from the Keras that wrote the file; "
            "the fingerprints differ"
        )
    backbone.rebuilds = True
    backbone.normalisation = fields["normalisation"]
    return backbone


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], Mapping[str, str], Mapping[str, Any]]:
    """(tensors, metadata, config) of a backbone file. `weights` in a config would name another file, and is left out.

    Raises:
      ArtifactError: damaged, of another version, or with values or fields that no backbone has.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, VERSION)
    fields = schema.check(str(path), metadata, FIELDS)
    config = schema.parse(f"the config in {path}", fields["config"])
    schema.check(f"the config in {path}", config, CONFIG_FIELDS)
    if (config.get("network") is None) == (config.get("keras_model") is None):
        raise errors.ArtifactError(f"the config in {path} must name either a network or a keras_model")
    tensor_file.check_values(path, tensors)
    left_out = {"weights"} | {name for name in ("network", "keras_model") if config.get(name) is None}
    return tensors, fields, {name: value for name, value in config.items() if name not in left_out}
