"""Metrics of finished tasks on a split."""

import pathlib

from k4p1 import errors
from k4p1.data.open_source import open_source
from k4p1.data.pipeline import Pipeline
from k4p1.data.source import Source
from k4p1.data.splits import Splits
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.groups import plan_groups
from k4p1.engine.pure import PureTask
from k4p1.patches import patch_file
from k4p1.runs.model_dir import ModelDir
from k4p1.tasks import attached_terms, objectives
from k4p1.tasks.loss import TaskLoss


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
        source = open_source(data or definition.data, definition.data_dir)
        splits = Splits(source, seed=seed, validation_fraction=definition.validation_fraction)
        splits.parts(split)
        info = patch_file.read_info(folder.patch(name))
        if source.labels != info.labels:
            raise errors.DataError(
                f"{source.name} has {len(source.labels)} labels ({', '.join(source.labels[:3])}, ...); task '{name}' was "
                f"trained on {len(info.labels)} ({', '.join(info.labels[:3])}, ...)"
            )
        patched = folder.load_task(name, backbone)
        groups = plan_groups({name: patched})
        objective = objectives.find(info.objective)
        targets = objective.targets(source.labels)
        pipeline = Pipeline(source, splits, patched.image_size, definition.batch_size, targets, cache=False)
        own_terms = [term for term in definition.terms if term.name not in attached_terms.OPTIONS]  # only help in training
        loss = TaskLoss(own_terms, objective).metrics() if own_terms else {}
        evaluator = Evaluator(PureTask(name, patched, groups), {**objective.measured(definition.metrics), **loss})
        found[name] = evaluator({group.name: group.initial() for group in groups}, pipeline.sequential(split))
    return found
