"""Transfer learning: new tasks on a frozen backbone (K4P1, sections 2 and 5.2)."""

from collections.abc import Callable, Sequence

from k4p1 import errors
from k4p1.backbones.backbone import Backbone
from k4p1.runs.run import RunResult, run
from k4p1.runs.settings import RunSettings
from k4p1.tasks.task import Task


def finetune(
    *,
    backbone: Backbone | Callable[[], Backbone],
    task: Task | None = None,
    tasks: Sequence[Task] = (),
    **settings,
) -> RunResult:
    """Trains the patch of one task, or of several that share nothing but the backbone; no value of it changes.

    Args:
      backbone: pretrained, or a function that loads it.
      task: what its patch spec names is trained; `full` is classic fine-tuning.
      tasks: several, in place of `task`; they take turns, and one folder holds them all.
      **settings: fields of `k4p1.runs.settings.RunSettings`.

    Returns:
      Result, task models and backbone.

    Raises:
      ConfigError: neither or both of `task` and `tasks`.
    """
    if (task is None) == (not tasks):
        raise errors.ConfigError("finetune needs either task or tasks")
    chosen = [task] if task is not None else list(tasks)
    return run(backbone, chosen, shared_trained=False, settings=RunSettings.of("finetune", **settings))
