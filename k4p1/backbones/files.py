"""Backbone files: `backbone.safetensors`, the shared values with what it takes to build the network again."""

import json
import pathlib

from k4p1.backbones import build
from k4p1.backbones.backbone import FILE_FORMAT, FILE_VERSION, Backbone
from k4p1.files import tensor_file

FORMAT, VERSION = FILE_FORMAT, FILE_VERSION


def save(backbone: Backbone, path: str | pathlib.Path) -> str:
    """Writes the backbone and returns its fingerprint."""
    tensors, fingerprint = backbone.tensors(), backbone.fingerprint()
    metadata = {
        "name": backbone.name,
        "config": json.dumps(dict(backbone.config), sort_keys=True),
        "scaling": backbone.scaling,
        "fingerprint": fingerprint,
    }
    tensor_file.write(path, FORMAT, VERSION, tensors, metadata)
    return fingerprint


def load(path: str | pathlib.Path) -> Backbone:
    """Builds the backbone of a file.

    Raises:
      ArtifactError: damaged, of another version, or it cannot be built here.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, VERSION)
    backbone = build.from_config(metadata["name"], json.loads(metadata["config"]), metadata["scaling"])
    backbone.assign(tensors)
    return backbone
