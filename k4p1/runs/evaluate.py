"""Metrics of finished tasks on a split."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from k4p1 import errors
from k4p1.data.open_source import open_source
from k4p1.data.pipeline import Pipeline
from k4p1.data.source import Source
from k4p1.data.splits import Splits
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.groups import plan_groups
from k4p1.engine.metrics import Metric
from k4p1.engine.pure import PureTask
from k4p1.patches import patch_file
from k4p1.patches.patched_model import PatchedModel
from k4p1.runs import confusion_matrix
from k4p1.runs.model_dir import ModelDir
from k4p1.tasks import attached_terms, objectives
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.task import Task

CONFUSION = "confusion"


def evaluate(
    model_dir: str | pathlib.Path,
    task: str | None = None,
    split: str = "test",
    data: str | Source | Any | None = None,
    confusion: bool = False,
) -> dict[str, dict[str, Any]]:
    """Metrics of finished tasks on a split, by task.

    Metrics and a loss that were Python objects are not in the files of a run: the objective's own stand for them.

    Args:
      model_dir: of a finished run.
      task: one task, or None for all.
      split: `train`, `validation` or `test`; held-out splits are those of the run.
      data: other data with the same labels; needed if the run was given a Python object.
      confusion: of tasks that classify, also `confusion`, an array (labels, answers) of counts, and the path of its picture,
        `confusion_picture`, in the folder of the task.

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
        definition, seed = _definition(folder, name, data)
        info = patch_file.read_info(folder.patch(name))
        more = {CONFUSION: confusion_matrix.Confusion(len(info.labels))} if confusion else {}
        found[name] = measure(folder.load_task(name, backbone), definition, seed, info.labels, split, more)
        if confusion:
            picture = folder.task_folder(name) / f"confusion_{split}.png"
            confusion_matrix.draw(found[name][CONFUSION], info.labels, f"{name}, {split}", picture)
            found[name]["confusion_picture"] = str(picture)
    return found


def dataset(
    model_dir: str | pathlib.Path, task: str | None = None, split: str = "test", data: str | Source | Any | None = None
) -> tf.data.Dataset:
    """Batches (images (batch, height, width, 3) uint8, labels (batch,) int64) of a split, as the run saw it.

    Of a task whose objective has other targets than `label`, they are dictionaries in place of labels. Images that cannot be
    read are left out.

    Args:
      model_dir, task, split, data: as of `evaluate`; `task` may be None where the run has one.
    """
    folder = ModelDir(model_dir)
    name = folder.one_task(task)
    definition, seed = _definition(folder, name, data)
    _, pipeline = _opened(definition, seed, (definition.image_size, definition.image_size))
    batches = pipeline.sequential(split).unbatch().filter(lambda example: example["weight"] > 0)

    def pair(example):
        others = {key: value for key, value in example.items() if key not in ("inputs", "weight")}
        return example["inputs"], others["label"] if set(others) == {"label"} else others

    return batches.map(pair).batch(definition.batch_size).prefetch(tf.data.AUTOTUNE)


def labels_of(model_dir: str | pathlib.Path, task: str) -> tuple[str, ...]:
    """Class names of a finished task."""
    return patch_file.read_info(ModelDir(model_dir).patch(task)).labels


def _opened(task: Task, seed: int, size: tuple[int, int]) -> tuple[Source, Pipeline]:
    """The data of a task as a run with this seed splits them, without augmentation, in images of this size."""
    source = open_source(task.data, task.data_dir)
    splits = Splits(source, seed=seed, validation_fraction=task.validation_fraction)
    targets = objectives.find(task.objective).targets(source.labels)
    return source, Pipeline(source, splits, size, task.batch_size, targets, cache=False)


def _definition(folder: ModelDir, name: str, data: object) -> tuple[Task, int]:
    """A task as it was trained, on the data given or its own, and the seed of its run."""
    definition, seed = folder.read_task(name)
    if data is None and not definition.data:
        raise errors.ConfigError(f"task '{name}' was trained on a Python object; give its data again: data=...")
    return dataclasses.replace(definition, data=definition.data if data is None else data), seed


def measure(
    patched: PatchedModel,
    task: Task,
    seed: int,
    labels: Sequence[str],
    split: str,
    more: Mapping[str, Metric] | None = None,
) -> dict[str, Any]:
    """Metrics of a task model on a split of its task's data.

    Args:
      patched: the model.
      task: its data, objective, metrics and loss; terms that are attached to a model only help in training.
      seed: of the run, which decides on held-out splits.
      labels: that the model knows.
      split: see `evaluate`.
      more: further metrics, by name.

    Raises:
      DataError: data with other labels.
    """
    source, pipeline = _opened(task, seed, patched.image_size)
    pipeline.examples(split)
    if source.labels != tuple(labels):
        raise errors.DataError(
            f"{source.name} has {len(source.labels)} labels ({', '.join(source.labels[:3])}, ...); task '{task.name}' was "
            f"trained on {len(labels)} ({', '.join(labels[:3])}, ...)"
        )
    groups = plan_groups({task.name: patched})
    objective = objectives.find(task.objective)
    own_terms = [term for term in task.terms if term.name not in attached_terms.OPTIONS]
    loss = TaskLoss(own_terms, objective).metrics() if own_terms else {}
    measured = {**task.measured(), **loss, **(more or {})}
    evaluator = Evaluator(PureTask(task.name, patched, groups), measured)
    return evaluator({group.name: group.initial() for group in groups}, pipeline.sequential(split))
