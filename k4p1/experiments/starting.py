"""What a task takes from finished ones: the values that it starts from, and its teacher."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from k4p1 import artifact, errors
from k4p1.backbones.backbone import Backbone
from k4p1.experiments.model_dir import ModelDir
from k4p1.export import factor_file, patch_file
from k4p1.patches.joint_compression import low_rank
from k4p1.patches.patched_model import PatchedModel
from k4p1.tasks.task import Task
from k4p1.tasks.teacher import Teacher


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The values that a task starts from.

    Attributes:
      path: of the patch file.
      tensors: its values by stored key.
      factors: adapter factors that the file shares with others.
      head: the head that it shares with others, or None.
    """

    path: pathlib.Path
    tensors: Mapping[str, np.ndarray]
    factors: Mapping[str, keras.Variable]
    head: keras.layers.Dense | None

    def write(self, patched: PatchedModel) -> None:
        """Writes the values into a task model; a trained alpha becomes the nearest factors where the model has a rank.

        Raises:
          ArtifactError: the file does not fit the model's patch.
        """
        wanted = {p.stored_key: p.stored_shape for p in patched.owned()}
        tensors = dict(self.tensors)
        for key in self.tensors:
            place, _, name = key.rpartition("/")
            if name == "alpha" and key not in wanted and f"{place}/gamma" in wanted:
                beta, gamma = low_rank(tensors.pop(key), wanted[f"{place}/gamma"][1])
                tensors |= {f"{place}/beta": beta, f"{place}/gamma": gamma}
        patched.restore(tensors, f"task '{patched.model.name}' ('{patched.spec}'), which starts from {self.path}")


def read_starts(tasks: Sequence[Task], backbone: Backbone) -> dict[str, Start]:
    """The starts of the tasks that name one.

    Raises:
      ArtifactError: missing, damaged, or for another backbone.
    """
    starts = {}
    fingerprint = backbone.fingerprint() if any(task.start for task in tasks) else ""
    for task in tasks:
        if not task.start:
            continue
        path = pathlib.Path(task.start).expanduser()
        tensors, metadata = artifact.read(path, patch_file.FORMAT, patch_file.VERSION)
        info = patch_file.PatchInfo.from_metadata(metadata)
        if info.fingerprint != fingerprint:
            raise errors.ArtifactError(
                f"task '{task.name}' cannot start from {path}: it is for a '{info.backbone}' with fingerprint "
                f"{info.fingerprint[:12]}, the backbone given has {fingerprint[:12]}"
            )
        factors = {}
        if info.factors:
            factors = factor_file.load_factors(_model_dir_of(path).factors, info.factors, fingerprint)
        head = None
        if info.shared_head:
            head = patch_file.load_head(path, info, backbone.features, _model_dir_of(path).heads)
        starts[task.name] = Start(path, tensors, factors, head)
    return starts


def read_teachers(tasks: Sequence[Task]) -> dict[str, Teacher]:
    """The teachers of the tasks that name one, each on a backbone of its own.

    Raises:
      ArtifactError: no such finished task, or a damaged file.
    """
    teachers = {}
    for task in tasks:
        if task.teacher:
            path = pathlib.Path(task.teacher).expanduser()
            folder = _model_dir_of(path)
            patched = patch_file.load_patch(path, folder.load_backbone(), folder.heads, folder.factors)
            teachers[task.name] = Teacher(patched, patch_file.read_info(path).labels, task.temperature)
    return teachers


def _model_dir_of(path: pathlib.Path) -> ModelDir:
    """The model directory that a patch file `tasks/<name>/patch.safetensors` is in."""
    above = path.resolve().parents
    if len(above) < 3 or above[1].name != "tasks":
        raise errors.ArtifactError(f"{path} is not in a model_dir; wanted MODEL_DIR/tasks/NAME/patch.safetensors")
    return ModelDir(above[2])
