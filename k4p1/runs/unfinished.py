"""Opens the state of a run on its way: what its checkpoints hold, as models.

A checkpoint holds flat vectors, one for each group of parameters. Beside it lie `layout.json`, which says what is where in
them, and the backbone as the run found it, until the run has written its own.
"""

import json
import math
import pathlib
from collections.abc import Sequence

import keras

from k4p1 import errors
from k4p1.backbones import files as backbone_files
from k4p1.backbones.backbone import Backbone
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import ParameterGroup
from k4p1.files import atomic, run_record
from k4p1.patches.apply import apply_patches
from k4p1.runs.model_dir import ModelDir, with_labels
from k4p1.tasks import objectives

STATES = ("newest", "best")
_LAYOUT, _BACKBONE = "layout.json", "backbone.safetensors"


def write_backbone(folder: ModelDir, backbone: Backbone) -> None:
    """Keeps the backbone that a run begins with, for as long as the run lasts."""
    path = folder.checkpoints / _BACKBONE
    if not path.exists():
        backbone_files.save(backbone, path)


def write_layout(folder: ModelDir, groups: Sequence[ParameterGroup]) -> None:
    """Says where each parameter is in the vectors of checkpoints: owner, keys and shapes by group."""
    found = {
        group.name: {
            "owner": group.owner,
            "keys": list(group.packing.names),
            "shapes": [list(s) for s in group.packing.shapes],
        }
        for group in groups
    }
    atomic.write_json(folder.checkpoints / _LAYOUT, found)


def remove_backbone(folder: ModelDir) -> None:
    """Removes the backbone of the beginning, once the run has written its own."""
    (folder.checkpoints / _BACKBONE).unlink(missing_ok=True)


def load_task(folder: ModelDir, task: str | None, state: str) -> keras.Model:
    """The model of a task at a checkpoint, with moving averages for statistics; see `k4p1.load_task`.

    Args:
      folder: of the run.
      task: may be None where the run has one task.
      state: `newest` or `best`.
    """
    if state not in STATES:
        raise errors.ConfigError(errors.unknown("checkpoint", state, STATES))
    names = sorted(path.parent.name for path in folder.root.glob("tasks/*/task.json"))
    name = task if task is not None or len(names) != 1 else names[0]
    if name not in names:
        raise errors.ConfigError(errors.unknown(f"task of {folder.root}", str(name), names))
    checkpoints = Checkpoints(folder.checkpoints, run=run_record.read(folder.root).get("config_hash", ""))
    paths = [checkpoints.best_path] if state == "best" else checkpoints.paths()[:1]
    if not paths or not paths[0].is_file():
        raise errors.ArtifactError(f"{folder.root} has no {state} checkpoint")
    vectors = checkpoints.read(paths[0]).state
    kept = folder.checkpoints / _BACKBONE
    backbone = backbone_files.load(kept if kept.is_file() else folder.backbone)
    definition, _ = folder.read_task(name)
    labels = (folder.task_folder(name) / "labels.txt").read_text(encoding="utf-8").splitlines()
    head = objectives.find(definition.objective).head(labels)
    patched = apply_patches(backbone, definition.patch, head=head, image_size=definition.image_size, name=name)
    places = _places(folder.checkpoints / _LAYOUT)
    for parameter in patched.parameters:
        place = places.get((parameter.owner_in(name), parameter.key))
        vector = None if place is None else vectors.get(f"vector/{place[0]}")
        if vector is not None:
            _, start, shape = place
            parameter.variable.assign(vector[start : start + math.prod(shape)].reshape(shape))
    return with_labels(patched.model, labels)


def _places(path: pathlib.Path) -> dict[tuple[str, str], tuple[str, int, tuple[int, ...]]]:
    """(group, first value, shape) of each parameter by owner and key."""
    try:
        layout = json.loads(path.read_text(encoding="utf-8"))
        found = {}
        for group, values in layout.items():
            start = 0
            for key, shape in zip(values["keys"], values["shapes"], strict=True):
                found[values["owner"], key] = (group, start, tuple(shape))
                start += math.prod(shape)
        return found
    except OSError as e:
        raise errors.ArtifactError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise errors.ArtifactError(f"{path} is damaged: {e}") from e
