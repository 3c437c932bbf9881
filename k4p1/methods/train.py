"""Multi-task training: shared weights learn from all tasks (K4P1, sections 2 and 5.3)."""

import pathlib
from collections.abc import Mapping, Sequence

import keras

from k4p1.backbones import BackboneLike
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.engine.optimizers import Optimizer
from k4p1.runs.run import RunResult, run
from k4p1.runs.settings import RunSettings
from k4p1.tasks.task import Task


def train(
    *,
    backbone: BackboneLike,
    tasks: Sequence[Task],
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
    """Trains all tasks together on one backbone whose weights learn from all of them.

    Args:
      backbone: or a function that makes it, or its name or path; see `k4p1.backbones.as_backbone`.
      tasks: with distinct names; each owns what its patch spec says and shares the rest.
      model_dir, steps, epochs, learning_rate, optimizer, patience, callbacks, seed, quiet: see
        `k4p1.runs.settings.RunSettings`.
      **settings: its further fields, such as `precision`, `evaluate_every`, `resume`.

    Returns:
      Result, task models and backbone; on disk, `model_dir` with backbone, patch files and `result.json`.
    """
    how = RunSettings.of(
        "train",
        **settings,
        **{"model_dir": model_dir, "steps": steps, "epochs": epochs, "learning_rate": learning_rate, "optimizer": optimizer},
        **{"patience": patience, "callbacks": callbacks, "seed": seed, "quiet": quiet},
    )
    return run(backbone, tasks, shared_trained=True, settings=how)
