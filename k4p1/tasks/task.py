"""A task: name, data, preprocessing, loss, metrics, patch and schedule."""

import dataclasses
import re

from k4p1 import errors
from k4p1.data.source import Source
from k4p1.engine import schedules
from k4p1.patches import PatchSpec

_POSITIVE = (
    "image_size",
    "batch_size",
    "steps",
    "epochs",
    "weight",
    "learning_rate",
    "workers",
    "worker_share",
    "temperature",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one task of a run is; nothing is opened or built yet.

    Attributes:
      name: letters, digits, `_`, `-` and `.`; names its files.
      data: `embedded/digits`, a prepared TFDS directory, an image folder, a TFDS name, or a `k4p1.data.Source`.
      data_dir: where TFDS keeps its data sets.
      patch: the patch spec.
      image_size: side in pixels; tasks of a run may differ.
      batch_size: images a step.
      steps: step target; None for that of the run, times `weight`.
      epochs: step target as passes over the training split, instead of `steps`.
      weight: share of the turns in a run, relative to other tasks.
      augment: spec of augmentations, such as `"shift(pixels=8)+flip"`; see `k4p1.data.augment`.
      loss: `softmax_cross_entropy` or `sigmoid_cross_entropy`; `distillation` with a teacher.
      teacher: path of the patch file of a finished task, in its model_dir. The task then learns what that one says of its
        images, not their labels, and has that one's classes: learning without forgetting.
      temperature: of the distillation.
      label_smoothing: s of the loss.
      metrics: `accuracy`, `top5_accuracy`; the first one selects.
      dropout: rate before the head.
      learning_rate, schedule: of this task, where they differ from the run's.
      validation: share of train to hold out where the data has no validation split; 0 for none.
      workers: how many workers of a cluster serve the task; None: a share of those that no task names.
      worker_share: that share, relative to other tasks without `workers`.
      start: path of a patch file whose values the task starts from; of the same kinds, on the same backbone. A trained alpha
        may start an adapter of lower rank.
      cache: keep decoded images in memory; None: when they take less than 1 GiB.

    Raises:
      ConfigError: a value that cannot be; the message says what is allowed.
      PatchError: a bad patch spec.
    """

    name: str
    data: str | Source
    data_dir: str | None = None
    patch: str = "scale_bias+head"
    image_size: int = 96
    batch_size: int = 32
    steps: int | None = None
    epochs: float | None = None
    weight: float = 1.0
    augment: str = ""
    loss: str = "softmax_cross_entropy"
    teacher: str = ""
    temperature: float = 2.0
    label_smoothing: float = 0.0
    metrics: tuple[str, ...] = ("accuracy",)
    dropout: float = 0.0
    learning_rate: float | None = None
    schedule: schedules.Schedule | None = None
    validation: float = 0.1
    start: str = ""
    cache: bool | None = None
    workers: int | None = None
    worker_share: float = 1.0

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            raise errors.ConfigError(f"task name {self.name!r}: wanted letters, digits, '_', '-' and '.'")
        if self.name == "shared":
            raise errors.ConfigError("task name 'shared' is taken by the shared parameters; choose another")
        PatchSpec.parse(self.patch)
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.metrics:
            raise errors.ConfigError(f"task '{self.name}' has no metric; the first one selects the best checkpoint")
        if self.steps is not None and self.epochs is not None:
            raise errors.ConfigError(f"task '{self.name}' has steps and epochs; give one of them")
        for field in _POSITIVE:
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise errors.ConfigError(f"task '{self.name}': {field}={value}; wanted a positive number")
        if bool(self.teacher) != (self.loss == "distillation"):
            raise errors.ConfigError(
                f"task '{self.name}' has loss '{self.loss}' and teacher '{self.teacher}'; a teacher goes with "
                "loss = 'distillation', and only with it"
            )
        if self.teacher and self.label_smoothing:
            raise errors.ConfigError(f"task '{self.name}': label_smoothing does nothing with a teacher, who gives no labels")
        if not 0 <= self.dropout < 1:
            raise errors.ConfigError(f"task '{self.name}': dropout={self.dropout}; wanted a rate in [0, 1)")

    def step_target(self, run_steps: int | None, examples: int) -> int:
        """The number of steps that the task trains.

        Args:
          run_steps: of the run, for a task that names neither steps nor epochs.
          examples: of its training split.
        """
        if self.steps is not None:
            return int(self.steps)
        if self.epochs is not None:
            return max(1, round(self.epochs * examples / self.batch_size))
        if run_steps is None:
            raise errors.ConfigError(f"task '{self.name}' has neither steps nor epochs, and the run has no steps")
        return max(1, round(run_steps * self.weight))
