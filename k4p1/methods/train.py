"""Multi-task training: shared weights learn from all tasks (K4P1, sections 2 and 5.3)."""

from collections.abc import Callable, Sequence

from k4p1.backbones.backbone import Backbone
from k4p1.runs.run import RunResult, run
from k4p1.runs.settings import RunSettings
from k4p1.tasks.task import Task


def train(*, backbone: Backbone | Callable[[], Backbone], tasks: Sequence[Task], **settings) -> RunResult:
    """Trains all tasks together on one backbone whose weights learn from all of them.

    Args:
      backbone: or a function that makes it.
      tasks: with distinct names; each owns what its patch spec says and shares the rest.
      **settings: fields of `k4p1.runs.settings.RunSettings`, such as `steps`, `model_dir`, `optimizer`.

    Returns:
      Result, task models and backbone; on disk, `model_dir` with backbone, patch files and `result.json`.
    """
    return run(backbone, tasks, shared_trained=True, settings=RunSettings.of("train", **settings))
