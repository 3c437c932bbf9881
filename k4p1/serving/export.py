"""SavedModels of the tasks of a finished run."""

import pathlib

from k4p1.patches import patch_file
from k4p1.runs.model_dir import ModelDir
from k4p1.serving.saved_model import export_task


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
