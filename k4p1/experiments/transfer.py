"""Transfer learning: one new task on a frozen backbone (K4P1, sections 2 and 5.2)."""

from collections.abc import Callable

from k4p1.backbones.backbone import Backbone
from k4p1.experiments.run import RunResult, run
from k4p1.experiments.settings import RunSettings
from k4p1.tasks.task import Task


def finetune(*, backbone: Backbone | Callable[[], Backbone], task: Task, **settings) -> RunResult:
    """Trains the patch of one task; no value of the backbone changes.

    Args:
      backbone: pretrained, or a function that loads it.
      task: what its patch spec names is trained; `full` is classic fine-tuning.
      **settings: fields of `k4p1.experiments.settings.RunSettings`.

    Returns:
      Result, task model and backbone.
    """
    return run(backbone, [task], shared_trained=False, settings=RunSettings.of("finetune", **settings))
