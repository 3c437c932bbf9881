"""How a run goes: what `train` and `finetune` have in common."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from k4p1 import checks, errors
from k4p1.cluster.policy import WorkerPolicy
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.engine.optimizers import Optimizer
from k4p1.engine.population import OF_SHARED
from k4p1.files.run_record import UNKNOWN, Configuration

PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(WorkerPolicy):
    """How a run goes, on a cluster with the policy of its workers too; what `train` and `finetune` have in common.

    Attributes:
      steps: step target of a task of turn_weight 1 that names neither steps nor epochs.
      epochs: in place of `steps`: passes over its own training images, for every task that names neither.
      learning_rate: in place of that of `optimizer`.
      optimizer: learning rate, optimizer, schedule, rules; see `OptimizerConfig`. Its name alone, or an optimizer of Keras,
        stands for one with the other defaults.
      patience: stop after so many evaluations in a row without a better mean validation metric; None: never. On one machine.
      callbacks: callbacks of Keras, or {task: callbacks} for a run of several tasks; see `k4p1.runs.callbacks`.
      linear_probe: tell when a linear classifier on the frozen backbone's features does better on the validation split than
        what was trained; None: where it costs little (500 images, or a tenth of the run's).
      seed: of everything random.
      evaluate_every: steps of all tasks together between evaluations; None: ten in a run.
      checkpoint_every: steps of all tasks together between checkpoints; None: ten in a run.
      keep_checkpoints: how many of the newest stay.
      recalibration_batches: training batches for the population statistics of batch normalisation.
      precision: `float32`, `mixed_float16` or `mixed_bfloat16`.
      cache_features: compute features once where only the head trains; None: where that is possible.
      backbone_normalisation: what `train` makes of the backbone's own batch normalisation where every task has a private
        one: `pooled` over the tasks, that of a task by name, or `none`: it stays as it began.
      statistics_of_shared: how statistics that tasks share are measured at the end of a run: `pooled` (of one population,
        with the variance between tasks), `mean` (of the tasks' means and variances), or `moving` (the moving averages that
        training left; K4P1, section 2, "global averages"). Selection while training uses `pooled`.
      refit: after selection, train again on train and validation together, for the number of steps that was best.
      evaluate_test: evaluate on the test split at the end; a method of several runs does so once, for the last.
      jit_compile: compile steps with XLA; not for a CPU, where it slows convolutions down.
      model_dir: where everything is written; None: nowhere.
      resume: resume from the newest checkpoint in model_dir.
      dry_run: build everything, print the parameter table, take one step per task, write nothing.
      quiet: show no progress.
      metrics_port: serve metrics for Prometheus there; None: nowhere.
      configuration: what the gin files say, which servers and workers compare with theirs.
      texts: further files for model_dir, by name; called once everything is built.
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    optimizer: OptimizerConfig | Optimizer | keras.optimizers.Optimizer | str | None = None
    patience: int | None = None
    callbacks: Sequence[keras.callbacks.Callback] | Mapping[str, Sequence[keras.callbacks.Callback]] = ()
    linear_probe: bool | None = None
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 3
    recalibration_batches: int = 50
    precision: str = "float32"
    cache_features: bool | None = None
    backbone_normalisation: str = "pooled"
    statistics_of_shared: str = "pooled"
    refit: bool = False
    evaluate_test: bool = True
    jit_compile: bool = False
    model_dir: str | pathlib.Path | None = None
    resume: bool = True
    dry_run: bool = False
    quiet: bool = False
    metrics_port: int | None = None
    configuration: Configuration = UNKNOWN
    texts: Callable[[], Mapping[str, str]] = dict

    @classmethod
    def of(cls, function: str, **settings: Any) -> "RunSettings":
        """Settings given to a run function; an unknown one is refused with the nearest name."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in settings:
            if name not in known:
                raise errors.ConfigError(errors.unknown(f"setting of {function}", name, known))
        return cls(**settings)

    def __post_init__(self):
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise errors.ConfigError(errors.unknown("precision", self.precision, PRECISIONS))
        if self.steps is not None and self.epochs is not None:
            raise errors.ConfigError("a run has steps or epochs; give one of them")
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) is not None:
                checks.check_number(name, getattr(self, name), checks.POSITIVE)
        if self.optimizer is not None and not isinstance(self.optimizer, OptimizerConfig):
            object.__setattr__(self, "optimizer", OptimizerConfig(optimizer=self.optimizer))
        if self.learning_rate is not None:
            chosen = dataclasses.replace(self.optimizer or OptimizerConfig(), learning_rate=self.learning_rate)
            object.__setattr__(self, "optimizer", chosen)
        for name in ("steps", "evaluate_every", "checkpoint_every", "keep_checkpoints", "recalibration_batches", "patience"):
            if getattr(self, name) is not None:
                checks.check_number(name, getattr(self, name), checks.POSITIVE_WHOLE)
        checks.check_number("seed", self.seed, checks.WHOLE)
        if self.statistics_of_shared not in OF_SHARED:
            raise errors.ConfigError(errors.unknown("statistics_of_shared", self.statistics_of_shared, OF_SHARED))
