"""The model of a task, of a finished run or of one on its way."""

import pathlib

import keras

from k4p1.patches import patch_file
from k4p1.runs import unfinished
from k4p1.runs.model_dir import ModelDir, with_labels


def load_task(model_dir: str | pathlib.Path, task: str | None = None, checkpoint: str | None = None) -> keras.Model:
    """The plain `keras.Model` of a task: images (batch, height, width, 3) of 0 to 255 to logits; `labels` are its classes.

    Args:
      model_dir: folder of a run.
      task: may be None where the run has one task.
      checkpoint: None: of a finished run. `newest` or `best`: the state of a checkpoint, of a run on its way, too.

    Raises:
      ConfigError: no such task or checkpoint.
      ArtifactError: the run has left nothing of this sort, or a damaged file.
    """
    folder = ModelDir(model_dir)
    if checkpoint is not None:
        return unfinished.load_task(folder, task, checkpoint)
    name = folder.one_task(task)
    patched = folder.load_task(name)
    return with_labels(patched.model, patch_file.read_info(folder.patch(name)).labels)
