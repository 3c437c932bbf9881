"""What a task takes from finished ones: the values that it starts from, and its teacher."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones.backbone import Backbone
from k4p1.patches import factor_file, patch_file
from k4p1.patches.joint_compression import low_rank
from k4p1.patches.patched_model import PatchedModel
from k4p1.patches.spec import PatchSpec
from k4p1.runs.model_dir import ModelDir
from k4p1.tasks import attached_terms
from k4p1.tasks.distillation import Teacher
from k4p1.tasks.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class WarmStart:
    """The values that a task starts from.

    Attributes:
      path: of the patch file.
      spec: its patch.
      tensors: its values by stored key.
      factors: adapter factors that the file shares with others.
      head: values of the head that it shares with others, or None.
    """

    path: pathlib.Path
    spec: PatchSpec
    tensors: Mapping[str, np.ndarray]
    factors: Mapping[str, keras.Variable]
    head: Mapping[str, np.ndarray] | None

    def _new_head(self, patched: PatchedModel, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The values of the own head where the file's is for other classes: it then begins anew, and this is said."""
        stored = patched.stored()
        head = [p.stored_key for p in patched.owned() if p.kind == "head"]
        if not any(key in tensors and tensors[key].shape != stored[key].shape for key in head):
            return {}
        print(
            f"task '{patched.model.name}' starts from {self.path}, but for the head: it is for other classes and begins anew"
        )
        return {key: stored[key] for key in head}

    def write(self, patched: PatchedModel) -> None:
        """Writes the values into a task model; a trained alpha becomes the nearest factors where the model has a rank.

        The head of a task with other classes keeps its own values.

        Raises:
          ArtifactError: the file does not fit the model's patch.
        """
        expected = {p.stored_key: p.stored_shape for p in patched.owned()}
        tensors = dict(self.tensors)
        for key in self.tensors:
            place, _, name = key.rpartition("/")
            if name == "alpha" and key not in expected and f"{place}/gamma" in expected:
                beta, gamma = low_rank(tensors.pop(key), expected[f"{place}/gamma"][1])
                tensors |= {f"{place}/beta": beta, f"{place}/gamma": gamma}
        tensors |= self._new_head(patched, tensors)
        if set(tensors) != set(expected):
            raise errors.ArtifactError(
                f"task '{patched.model.name}' cannot start from {self.path}: it has the patch '{self.spec}', the task "
                f"'{patched.spec}'; give the task a patch with the same values"
            )
        what = f"task '{patched.model.name}' ('{patched.spec}'), which starts from {self.path}"
        patched.restore(tensors, what)
        if self.head is not None and patched.spec.shares_head:
            patch_file.assign_head(patched, self.head, what)


def read_warm_starts(tasks: Sequence[Task], backbone: Backbone) -> dict[str, WarmStart]:
    """The starts of the tasks that name one.

    Raises:
      ArtifactError: missing, damaged, or for another backbone.
    """
    starts = {}
    for task in tasks:
        if not task.init_from:
            continue
        path = pathlib.Path(task.init_from).expanduser()
        tensors, info = patch_file.read_patch(path)
        fingerprint = backbone.fingerprint(info.structure_version)
        if info.fingerprint != fingerprint:
            raise errors.ArtifactError(
                f"task '{task.name}' cannot start from {path}: it is for a '{info.backbone}' with fingerprint "
                f"{info.fingerprint[:12]}, the backbone given has {fingerprint[:12]}"
            )
        factors = {}
        if info.factors:
            factors = factor_file.load_factors(model_dir_of(path).factors, info.factors, fingerprint)
        head = None
        if info.shared_head:
            head = patch_file.load_head(path, info, model_dir_of(path).heads)
        starts[task.name] = WarmStart(path, info.spec, tensors, factors, head)
    return starts


def read_teachers(tasks: Sequence[Task]) -> dict[str, Teacher]:
    """The teachers of the tasks' distillation terms by path, each on a backbone of its own.

    Raises:
      ArtifactError: no such finished task, or a damaged file.
    """
    teachers = {}
    for task in tasks:
        for term in task.terms:
            given = term.options.get("teacher") if term.name in attached_terms.WITH_TEACHER else None
            if given and given not in teachers:
                path = pathlib.Path(given).expanduser()
                info = patch_file.read_info(path)
                folder = model_dir_of(path)
                backbone = folder.load_backbone()
                patched = patch_file.load_patch(path, backbone, folder.heads, folder.factors)
                teachers[given] = Teacher(info.task, patched, info.labels, backbone.fingerprint(), given, info.objective)
    return teachers


def model_dir_of(path: pathlib.Path) -> ModelDir:
    """The model directory that a patch file `tasks/<name>/patch.safetensors` is in."""
    above = path.resolve().parents
    if len(above) < 3 or above[1].name != "tasks":
        raise errors.ArtifactError(f"{path} is not in a model_dir; expected MODEL_DIR/tasks/NAME/patch.safetensors")
    return ModelDir(above[2])
