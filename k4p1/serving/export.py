"""SavedModels of the tasks of finished runs."""

import pathlib
from collections.abc import Sequence

from k4p1 import errors
from k4p1.patches import patch_file
from k4p1.runs.model_dir import ModelDir
from k4p1.serving.mixed import MixedModel
from k4p1.serving.saved_model import export_task
from k4p1.serving.together import TaskToServe, export_together


def export(
    model_dir: str | pathlib.Path, export_dir: str | pathlib.Path, task: str | None = None
) -> dict[str, tuple[pathlib.Path, float]]:
    """Writes the SavedModels of finished tasks: (path, largest difference on the probe) by task."""
    folder = ModelDir(model_dir)
    names = folder.chosen_tasks(task)
    backbone = folder.load_backbone()
    exported = {}
    for name in names:
        patched = folder.load_task(name, backbone)
        info = patch_file.read_info(folder.patch(name))
        target = pathlib.Path(export_dir) / name
        exported[name] = export_task(patched.model, patched.image_size, info.labels, target, info.objective)
    return exported


def export_all_together(
    model_dirs: Sequence[str | pathlib.Path], export_dir: str | pathlib.Path
) -> tuple[pathlib.Path, float]:
    """Writes one SavedModel of all tasks of runs on the same backbone: (path, largest difference on the probe).

    Raises:
      ConfigError: runs on different backbones, or two tasks of one name; names them.
    """
    first = ModelDir(model_dirs[0])
    backbone = first.load_backbone()
    fingerprint = backbone.fingerprint()
    models: dict[tuple[int, int], MixedModel] = {}
    tasks: dict[str, TaskToServe] = {}
    for folder in map(ModelDir, model_dirs):
        for name in folder.tasks():
            info = patch_file.read_info(folder.patch(name))
            if name in tasks:
                raise errors.ConfigError(f"two runs have a task '{name}'; the second is {folder.root}")
            if backbone.fingerprint(info.structure_version) != info.fingerprint:
                raise errors.ConfigError(
                    f"task '{name}' of {folder.root} is on another backbone ({info.fingerprint[:12]}) than those of "
                    f"{first.root} ({fingerprint[:12]}); export it apart"
                )
            patched = folder.load_task(name, backbone)
            size = patched.image_size
            models.setdefault(size, MixedModel(backbone, size)).put(name, patched)
            tasks[name] = TaskToServe(patched, info.labels)
    return export_together(tasks, list(models.values()), export_dir)
