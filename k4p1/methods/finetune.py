"""Transfer learning: new tasks on a frozen backbone (K4P1, sections 2 and 5.2)."""

import pathlib
from collections.abc import Mapping, Sequence

import keras

from k4p1 import errors
from k4p1.backbones import BackboneLike
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.engine.optimizers import Optimizer
from k4p1.runs.run import RunResult, run
from k4p1.runs.settings import RunSettings
from k4p1.tasks.task import Task


def finetune(
    *,
    backbone: BackboneLike,
    task: Task | None = None,
    tasks: Sequence[Task] = (),
    model_dir: str | pathlib.Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    optimizer: OptimizerConfig | Optimizer | keras.optimizers.Optimizer | str | None = None,
    patience: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] | Mapping[str, Sequence[keras.callbacks.Callback]] = (),
    seed: int = 0,
    quiet: bool = False,
    **settings,
) -> RunResult:
    """Trains the patch of one task, or of several that share nothing but the backbone; no value of it changes.

    Args:
      backbone: pretrained, or a function that loads it, or its name or path; see `k4p1.backbones.as_backbone`.
      task: what its patch spec names is trained; `full` is classic fine-tuning.
      tasks: several, in place of `task`; they take turns, and one folder holds them all.
      model_dir, steps, epochs, learning_rate, optimizer, patience, callbacks, seed, quiet: see
        `k4p1.runs.settings.RunSettings`.
      **settings: its further fields, such as `precision`, `evaluate_every`, `refit`, `resume`.

    Returns:
      Result, task models and backbone.

    Raises:
      ConfigError: neither or both of `task` and `tasks`, or an unknown setting.
    """
    if (task is None) == (not tasks):
        raise errors.ConfigError("finetune needs either task or tasks")
    chosen = [task] if task is not None else list(tasks)
    how = RunSettings.of(
        "finetune",
        **settings,
        **{"model_dir": model_dir, "steps": steps, "epochs": epochs, "learning_rate": learning_rate, "optimizer": optimizer},
        **{"patience": patience, "callbacks": callbacks, "seed": seed, "quiet": quiet},
    )
    return run(backbone, chosen, shared_trained=False, settings=how)
