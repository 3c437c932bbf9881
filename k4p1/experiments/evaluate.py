"""Looks at what a run left: metrics on a split, predictions for images, SavedModels."""

import pathlib
from collections.abc import Sequence

import numpy as np

from k4p1 import errors
from k4p1.data import preprocessing
from k4p1.data.open_source import open_source
from k4p1.data.pipeline import Pipeline
from k4p1.data.source import Source
from k4p1.data.splits import Splits
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.groups import plan_groups
from k4p1.engine.optimization import Optimization
from k4p1.engine.pure import PureTask
from k4p1.experiments.model_dir import ModelDir
from k4p1.export import patch_file
from k4p1.export.saved_model import export_task
from k4p1.tasks.losses import DISTILLATION, Metrics


def evaluate(
    model_dir: str | pathlib.Path, task: str | None = None, split: str = "test", data: str | Source | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of finished tasks on a split, by task.

    Args:
      model_dir: of a finished run.
      task: one task, or None for all; tasks that learned from a teacher want `data` of their own classes.
      split: `train`, `validation` or `test`; held-out splits are those of the run.
      data: other data with the same labels; needed if the run was given a Python object.

    Raises:
      ConfigError: unknown task or split.
      ArtifactError: no finished run, or a damaged file.
      DataError: data that cannot be opened, or with other labels.
    """
    folder = ModelDir(model_dir)
    names = folder.chosen_tasks(task)
    backbone = folder.load_backbone()
    found = {}
    for name in names:
        definition, seed = folder.read_task(name)
        if definition.teacher and not data and task is None:
            continue  # what it learned from has labels of other classes
        if not (data or definition.data):
            raise errors.ConfigError(f"task '{name}' was trained on a Python object; give its data again: data=...")
        source = open_source(data or definition.data, definition.data_dir)
        splits = Splits(source, seed=seed, validation=definition.validation)
        splits.parts(split)
        info = patch_file.read_info(folder.patch(name))
        if source.labels != info.labels:
            raise errors.DataError(
                f"{source.name} has {len(source.labels)} labels ({', '.join(source.labels[:3])}, ...); task '{name}' was "
                f"trained on {len(info.labels)} ({', '.join(info.labels[:3])}, ...)"
            )
        patched = folder.load_task(name, backbone)
        groups = plan_groups({name: patched}, Optimization())
        pipeline = Pipeline(source, splits, patched.image_size, definition.batch_size, len(source.labels), cache=False)
        loss = "softmax_cross_entropy" if definition.loss == DISTILLATION else definition.loss
        evaluator = Evaluator(PureTask(name, patched, groups), Metrics(definition.metrics, loss))
        found[name] = evaluator({group.name: group.initial() for group in groups}, pipeline.sequential(split))
    return found


def predict(
    model_dir: str | pathlib.Path, task: str | None, images: Sequence[str | pathlib.Path], top: int = 3
) -> list[tuple[str, list[tuple[str, float]]]]:
    """The `top` most probable labels of image files, with their probabilities.

    Args:
      model_dir: of a finished run.
      task: may be None where the run has one task.
      images: paths.
      top: how many labels a picture.

    Raises:
      DataError: an image that cannot be read.
    """
    import tensorflow as tf

    folder = ModelDir(model_dir)
    names = folder.chosen_tasks(task)
    if len(names) > 1:
        raise errors.ConfigError(f"{folder.root} has several tasks; say which with --task: {', '.join(names)}")
    if not images:
        raise errors.ConfigError("no image given; add the paths of images")
    labels = patch_file.read_info(folder.patch(names[0])).labels
    pixels = []
    patched = folder.load_task(names[0])
    for path in images:
        try:
            encoded = pathlib.Path(path).read_bytes()
            pixels.append(preprocessing.resize(preprocessing.decode(tf.constant(encoded)), patched.image_size))
        except OSError as e:
            raise errors.DataError(f"cannot read image {path}: {e.strerror}") from e
        except tf.errors.OpError as e:
            raise errors.DataError(f"cannot decode image {path}: wanted JPEG, PNG, BMP or GIF") from e
    found = []
    for path, image in zip(images, pixels, strict=True):
        probabilities = tf.nn.softmax(patched.model(image[None], training=False)[0]).numpy()
        best = np.argsort(-probabilities)[:top]
        found.append((str(path), [(labels[i], float(probabilities[i])) for i in best]))
    return found


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
        labels = patch_file.read_info(folder.patch(name)).labels
        exported[name] = export_task(patched.model, patched.image_size, labels, pathlib.Path(export_dir) / name)
    return exported
