"""Backbone files: `backbone.safetensors`, the shared values with what it takes to build the network again."""

import json
import pathlib

import keras

from k4p1 import errors
from k4p1.backbones import build, structure
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
        "structure_version": str(structure.VERSION),
    }
    tensor_file.write(path, FORMAT, VERSION, tensors, metadata)
    return fingerprint


def load(path: str | pathlib.Path) -> Backbone:
    """Builds the backbone of a file.

    Args:
      path: of a backbone file, such as `MODEL_DIR/backbone/backbone.safetensors`.

    Raises:
      ArtifactError: damaged, of another version, or it cannot be built here as it was.
    """
    tensors, metadata = tensor_file.read(path, FORMAT, VERSION)
    backbone = build.from_config(metadata["name"], json.loads(metadata["config"]), metadata["scaling"])
    backbone.assign(tensors)
    version = metadata.get("structure_version", "1")
    if version != "1" and backbone.fingerprint(int(version)) != metadata["fingerprint"]:
        raise errors.ArtifactError(
            f"{path}: Keras {keras.__version__} builds '{backbone.name}' differently from the Keras that wrote the file; "
            "the fingerprints differ"
        )
    return backbone
