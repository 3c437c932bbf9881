"""Metrics of finished tasks on a split."""

import dataclasses
import pathlib
from collections.abc import Sequence

from k4p1 import errors
from k4p1.data.open_source import open_source
from k4p1.data.pipeline import Pipeline
from k4p1.data.source import Source
from k4p1.data.splits import Splits
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.groups import plan_groups
from k4p1.engine.pure import PureTask
from k4p1.patches import patch_file
from k4p1.patches.patched_model import PatchedModel
from k4p1.runs.model_dir import ModelDir
from k4p1.tasks import attached_terms, objectives
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.task import Task


def evaluate(
    model_dir: str | pathlib.Path, task: str | None = None, split: str = "test", data: str | Source | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of finished tasks on a split, by task.

    Args:
      model_dir: of a finished run.
      task: one task, or None for all.
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
        if not (data or definition.data):
            raise errors.ConfigError(f"task '{name}' was trained on a Python object; give its data again: data=...")
        definition = dataclasses.replace(definition, data=data or definition.data)
        info = patch_file.read_info(folder.patch(name))
        found[name] = measure(folder.load_task(name, backbone), definition, seed, info.labels, split)
    return found


def measure(patched: PatchedModel, task: Task, seed: int, labels: Sequence[str], split: str) -> dict[str, float]:
    """Metrics of a task model on a split of its task's data.

    Args:
      patched: the model.
      task: its data, objective, metrics and loss; terms that are attached to a model only help in training.
      seed: of the run, which decides on held-out splits.
      labels: that the model knows.
      split: see `evaluate`.

    Raises:
      DataError: data with other labels.
    """
    source = open_source(task.data, task.data_dir)
    splits = Splits(source, seed=seed, validation_fraction=task.validation_fraction)
    splits.parts(split)
    if source.labels != tuple(labels):
        raise errors.DataError(
            f"{source.name} has {len(source.labels)} labels ({', '.join(source.labels[:3])}, ...); task '{task.name}' was "
            f"trained on {len(labels)} ({', '.join(labels[:3])}, ...)"
        )
    groups = plan_groups({task.name: patched})
    objective = objectives.find(task.objective)
    targets = objective.targets(source.labels)
    pipeline = Pipeline(source, splits, patched.image_size, task.batch_size, targets, cache=False)
    own_terms = [term for term in task.terms if term.name not in attached_terms.OPTIONS]
    loss = TaskLoss(own_terms, objective).metrics() if own_terms else {}
    evaluator = Evaluator(PureTask(task.name, patched, groups), {**objective.measured(task.metrics), **loss})
    return evaluator({group.name: group.initial() for group in groups}, pipeline.sequential(split))
