"""A task: name, data, preprocessing, loss, metrics, patch and schedule."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from k4p1 import checks, errors
from k4p1.data import augment as augmentations
from k4p1.data import python_data
from k4p1.data.source import Source
from k4p1.engine import schedules
from k4p1.engine.metrics import Metric
from k4p1.patches import PatchSpec
from k4p1.tasks import attached_terms, distillation, objectives, python_objects
from k4p1.tasks.loss import Loss, TermSpec
from k4p1.tasks.loss import parse as parse_loss
from k4p1.tasks.objectives import Objective
from k4p1.tasks.task_name import name_of_data

_NUMBERS = {
    "image_size": checks.POSITIVE_WHOLE,
    "batch_size": checks.POSITIVE_WHOLE,
    "steps": checks.POSITIVE_WHOLE,
    "epochs": checks.POSITIVE,
    "turn_weight": checks.POSITIVE,
    "learning_rate": checks.POSITIVE,
    "workers": checks.POSITIVE_WHOLE,
    "worker_share": checks.POSITIVE,
    "temperature": checks.POSITIVE,
    "label_smoothing": checks.SHARE,
    "dropout": checks.SHARE,
    "validation_fraction": checks.SHARE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What one task of a run is; nothing is opened or built yet.

    Attributes:
      name: ASCII letters, digits, `_`, `-` and `.`; names its files. None: that of the data, see `task_name`.
      data: `embedded/digits`, a prepared TFDS directory, an image folder, a TFDS name, a `k4p1.data.Source`; or in Python
        (images, labels), a `tf.data.Dataset` or `keras.utils.PyDataset` of such pairs, or {split: one of these}; see
        `k4p1.data.python_data`.
      data_dir: where TFDS keeps its data sets.
      patch: the patch spec.
      image_size: side in pixels; tasks of a run may differ.
      batch_size: images per step.
      steps: step target; None for that of the run, times `turn_weight`.
      epochs: step target as passes over the training split, instead of `steps`.
      turn_weight: share of the turns in a run, relative to other tasks.
      augment: spec of augmentations, such as `"shift(pixels=8)+flip"`; see `k4p1.data.augment`. In
        Python also a function from image to image, or a layer of Keras.
      objective: what the task is about: `classification`, or the name of an `Objective` that you registered, or one.
      loss: a sum of weighted terms, as text or as {term: weight}, see `k4p1.tasks.loss`; None: the objective's default. For
        classification: `softmax_cross_entropy`, `sigmoid_cross_entropy`; for all with logits: `distillation`; for
        tailored networks: `complexity` and `block_distillation`, see `k4p1.tasks.tailoring`. In Python also a function of
        (labels, logits) or a loss of Keras, see `k4p1.tasks.python_objects`.
      class_weight: how much examples of a class count in the training loss, by label or number; 1 where it is not named.
      teacher: path of the patch file of a finished task, in its model_dir, for terms of distillation that name none.
      temperature: of distillation terms that name none.
      label_smoothing: s of terms that have it and do not name it.
      metrics: names of the objective's metrics, of which the first one selects; None: the objective's default. In Python
        also functions of (labels, logits) and metrics of Keras.
      dropout: rate before the head.
      learning_rate, schedule: of this task, where they differ from the run's.
      validation_fraction: share of train to hold out where the data has no validation split; 0 for none.
      workers: how many workers of a cluster serve the task; None: a share of those that no task names.
      worker_share: that share, relative to other tasks without `workers`.
      init_from: path of a patch file whose values the task starts from; of the same kinds, on the same backbone. A
        trained alpha may start an adapter of lower rank.
      cache: keep decoded images in memory; None: when they take less than 1 GiB.

    Raises:
      ConfigError: a value that cannot be; the message says what is allowed.
      PatchError: a bad patch spec.
    """

    name: str | None = None
    data: str | Source | object
    data_dir: str | None = None
    patch: str | PatchSpec = "scale_bias+head"
    image_size: int = 96
    batch_size: int = 32
    steps: int | None = None
    epochs: float | None = None
    turn_weight: float = 1.0
    augment: str | Callable = ""
    objective: str | Objective = "classification"
    loss: Loss | None = None
    class_weight: Mapping[str | int, float] | None = None
    teacher: str = ""
    temperature: float = 2.0
    label_smoothing: float = 0.0
    metrics: tuple[str | Callable, ...] | None = None
    dropout: float = 0.0
    learning_rate: float | None = None
    schedule: schedules.Schedule | str | None = None
    validation_fraction: float = 0.1
    init_from: str = ""
    cache: bool | None = None
    workers: int | None = None
    worker_share: float = 1.0

    def __post_init__(self):
        if isinstance(self.data, pathlib.Path):
            object.__setattr__(self, "data", str(self.data))
        if not isinstance(self.data, str):
            object.__setattr__(self, "data", python_data.as_source(self.data))
        if self.name is None:
            object.__setattr__(self, "name", name_of_data(self.data))
        checks.check_task_name(self.name)
        if self.name == "shared":
            raise errors.ConfigError("task name 'shared' is taken by the shared parameters; choose another")
        object.__setattr__(self, "patch", PatchSpec.parse(self.patch))
        objective = objectives.find(self.objective)
        if self.metrics is None:
            object.__setattr__(self, "metrics", objective.default_metrics)
        if isinstance(self.metrics, str) or not isinstance(self.metrics, Sequence):
            raise errors.ConfigError(f"task '{self.name}': metrics={self.metrics!r}; expected names such as ('accuracy',)")
        object.__setattr__(self, "metrics", tuple(self.metrics))
        for one in self.metrics:
            if not isinstance(one, str) and not callable(one):
                raise errors.ConfigError(
                    f"task '{self.name}': metric {one!r}; expected a name, a function or a Keras metric"
                )
        if not self.metrics:
            raise errors.ConfigError(f"task '{self.name}' has no metric; the first one selects the best checkpoint")
        self._check(self.measured)
        self._check(augmentations.parse, self.augment)
        if self.class_weight is not None and not isinstance(self.class_weight, Mapping):
            raise errors.ConfigError(f"task '{self.name}': class_weight={self.class_weight!r}; expected {{label: weight}}")
        for label, weight in (self.class_weight or {}).items():
            checks.check_number(f"task '{self.name}': class_weight of {label!r}", weight, checks.AT_LEAST_ZERO)
        if self.steps is not None and self.epochs is not None:
            raise errors.ConfigError(f"task '{self.name}' has steps and epochs; give one of them")
        for field, allowed in _NUMBERS.items():
            value = getattr(self, field)
            if value is not None:
                checks.check_number(f"task '{self.name}': {field}", value, allowed)
        if self.cache is not None:
            checks.check_flag(f"task '{self.name}': cache", self.cache)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", self._check(schedules.find, self.schedule))
        self._check_distillation()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of the metrics; the first one selects."""
        return tuple(one if isinstance(one, str) else python_objects.name_of(one) for one in self.metrics)

    def measured(self) -> dict[str, Metric]:
        """The metrics by name, those given as Python objects included."""
        of_objective = objectives.find(self.objective).measured([one for one in self.metrics if isinstance(one, str)])
        own = {python_objects.name_of(one): python_objects.metric(one) for one in self.metrics if not isinstance(one, str)}
        found = {**of_objective, **own}
        return {name: found[name] for name in self.metric_names}

    def class_weights(self, labels: Sequence[str]) -> tuple[float, ...]:
        """The weights of the classes in the order of `labels`; empty where none is given.

        Raises:
          ConfigError: a label that the data does not have.
        """
        if not self.class_weight:
            return ()
        numbers = {label: number for number, label in enumerate(labels)}
        weights = [1.0] * len(labels)
        for label, weight in self.class_weight.items():
            number = numbers.get(label, label)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(labels):
                raise errors.ConfigError(
                    f"task '{self.name}': {errors.unknown('label in class_weight', str(label), list(labels)[:20])}"
                )
            weights[number] = float(weight)
        return tuple(weights)

    @functools.cached_property
    def terms(self) -> tuple[TermSpec, ...]:
        """The terms of the loss."""
        objective = objectives.find(self.objective)
        defaults = {"label_smoothing": self.label_smoothing, "teacher": self.teacher, "temperature": self.temperature}
        return self._check(parse_loss, objective.default_loss if self.loss is None else self.loss, objective, defaults)

    def _check(self, function: Callable, *arguments: Any) -> Any:
        """Calls a function; its errors name the task."""
        try:
            return function(*arguments)
        except errors.ConfigError as e:
            raise errors.ConfigError(f"task '{self.name}': {e}") from e

    def _check_distillation(self) -> None:
        terms = [term for term in self.terms if term.name in attached_terms.WITH_TEACHER]
        if self.teacher and not terms:
            raise errors.ConfigError(
                f"task '{self.name}' has a teacher, and its loss no term 'distillation'; add it, such as loss = "
                "'softmax_cross_entropy + 0.5*distillation'"
            )
        for term in terms:
            if not term.options["teacher"]:
                raise errors.ConfigError(
                    f"task '{self.name}': '{term.name}' has no teacher; give {term.name}(teacher='PATCH FILE'), or teacher"
                )
            if term.name != distillation.NAME:
                continue
            if term.options["head"] not in distillation.HEADS:
                unknown = errors.unknown("head of distillation", term.options["head"], distillation.HEADS)
                raise errors.ConfigError(f"task '{self.name}': {unknown}")
            checks.check_number(f"task '{self.name}': temperature", term.options["temperature"], checks.POSITIVE)

    def step_target(self, run_steps: int | None, examples: int, run_epochs: float | None = None) -> int:
        """The number of steps that the task trains.

        Args:
          run_steps: of the run, for a task that names neither steps nor epochs.
          examples: of its training split.
          run_epochs: of the run, in place of `run_steps`.
        """
        if self.steps is not None:
            return self.steps
        epochs = self.epochs if self.epochs is not None else run_epochs
        if epochs is not None:
            return max(1, round(epochs * examples / self.batch_size))
        if run_steps is None:
            raise errors.ConfigError(f"task '{self.name}' has neither steps nor epochs, and the run has none")
        return max(1, round(run_steps * self.turn_weight))
