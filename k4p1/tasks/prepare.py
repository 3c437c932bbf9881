"""Opens the data of a run's tasks and builds their models on one backbone."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import keras

from k4p1 import errors
from k4p1.backbones.backbone import Backbone
from k4p1.data.open_source import open_source
from k4p1.data.pipeline import Pipeline
from k4p1.data.splits import Splits
from k4p1.data.targets import SAMPLE_WEIGHT, WithSampleWeight
from k4p1.engine.metrics import Metric
from k4p1.patches.apply import apply_patches
from k4p1.patches.patched_layer import RANDOM, STATISTICS, TRAINED
from k4p1.patches.patched_model import PatchedModel
from k4p1.patches.task_head import FEATURES
from k4p1.tasks import attached_terms, objectives, python_objects
from k4p1.tasks.distillation import Lesson, Teacher
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.task import Task


class WarmStart(Protocol):
    """The values that a task starts from: adapter factors, where it shares them, and the rest."""

    factors: Mapping[str, keras.Variable]

    def write(self, patched: PatchedModel) -> None:
        """Writes the rest into the task model."""


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedTask:
    """A task with its data open and its model built.

    Attributes:
      task: what was asked for.
      labels: class names.
      pipeline: of its images.
      splits: sizes of its splits.
      patched: its model and parameters.
      loss: its terms.
      metrics: by name, those of evaluation: the task's, `loss`, and what its teachers add.
      steps: step target.
      lessons: what distillation terms compare, by the position of the term in the loss.
    """

    task: Task
    labels: tuple[str, ...]
    pipeline: Pipeline
    splits: Splits
    patched: PatchedModel
    loss: TaskLoss
    metrics: Mapping[str, Metric]
    steps: int
    lessons: Mapping[int, Lesson] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def has_inner_dropout(self) -> bool:
        """Whether the backbone drops something at random in training."""
        seeds = [p for p in self.patched.parameters if p.role == RANDOM]
        return any(not p.key.startswith("head") for p in seeds)

    def only_head_trains(self) -> bool:
        """Whether features never change: only the head is trained, with fixed preprocessing."""
        if self.patched.observers or self.patched.head_endpoints != (FEATURES,):  # they look at images, or at maps
            return False
        moving = [p for p in self.patched.parameters if p.role in (TRAINED, STATISTICS)]
        return bool(moving) and all(p.kind == "head" for p in moving) and not self.pipeline.augmented


def prepare_tasks(
    backbone: Backbone,
    tasks: Sequence[Task],
    *,
    shared_trained: bool,
    steps: int | None = None,
    epochs: float | None = None,
    seed: int = 0,
    starts: Mapping[str, WarmStart] | None = None,
    teachers: Mapping[str, Teacher] | None = None,
) -> list[PreparedTask]:
    """Prepares the tasks of a run.

    Args:
      backbone: shared by all.
      tasks: with distinct names.
      shared_trained: whether shared weights are learned.
      steps: step target of a task of turn_weight 1 that names none.
      epochs: in place of `steps`.
      seed: of heads, validation splits and data order.
      starts: values that tasks start from, by task.
      teachers: of distillation terms, by the path of their patch file.

    Raises:
      ConfigError: no task, a name used twice, or an image too small.
      DataError: data that cannot be opened.
      PatchError: a patch that does not fit the backbone.
    """
    if not tasks:
        raise errors.ConfigError("a run needs at least one task")
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise errors.ConfigError(f"task name '{name}' is used twice; every task needs its own")
    shared_heads: dict[tuple, keras.layers.Layer] = {}
    fingerprint = backbone.fingerprint() if teachers else ""
    prepared = []
    for task in tasks:
        task_seed = zlib.crc32(f"{seed}/{task.name}".encode()) & 0x7FFFFFFF
        source = open_source(task.data, task.data_dir)
        objective = objectives.find(task.objective)
        splits = Splits(source, seed=seed, validation_fraction=task.validation_fraction)
        targets = objective.targets(source.labels)
        if task.class_weight and "label" not in targets.fields:
            raise errors.ConfigError(f"task '{task.name}': class_weight is for labels, and '{objective.name}' has none")
        pipeline = Pipeline(
            source,
            splits,
            (task.image_size, task.image_size),
            task.batch_size,
            WithSampleWeight(targets) if SAMPLE_WEIGHT in source.fields else targets,
            augment=task.augment,
            seed=task_seed,
            cache=task.cache,
        )
        if not source.labels:
            raise errors.DataError(f"{source.name} names no classes, and task '{task.name}' needs their names")
        start = (starts or {}).get(task.name)
        key = (objective.name, source.labels)
        patched = apply_patches(
            backbone,
            task.patch,
            head=objective.head(source.labels),
            image_size=task.image_size,
            shared_trained=shared_trained,
            shared_head=shared_heads.get(key),
            factors=start.factors if start else None,
            dropout=task.dropout,
            seed=task_seed,
            name=task.name,
        )
        if start:
            start.write(patched)
        if patched.spec.shares_head:
            shared_heads.setdefault(key, patched.head)
        attached = {}
        for number, term in enumerate(task.terms):
            if term.name in attached_terms.OPTIONS:
                how = {"number": number, "task": task.name, "labels": source.labels, "fingerprint": fingerprint}
                patched, attached[number] = attached_terms.attach(
                    patched, term.name, term.options, teachers=teachers or {}, **how
                )
        loss = TaskLoss(task.terms, objective, attached, task.class_weights(source.labels))
        _try_python_objects(task, len(source.labels))
        lessons = {number: term for number, term in attached.items() if isinstance(term, Lesson)}
        metrics = {**task.measured(), **loss.metrics()}
        target = task.step_target(steps, splits.size("train"), epochs)
        prepared.append(PreparedTask(task, source.labels, pipeline, splits, patched, loss, metrics, target, lessons))
    _check_old_heads(prepared)
    return prepared


def _try_python_objects(task: Task, classes: int) -> None:
    for term in task.terms:
        if term.function is not None:
            python_objects.check(f"task '{task.name}': loss {term.name}", term.function, classes)
    measured = task.measured()
    for given, name in zip(task.metrics, task.metric_names, strict=True):
        if not isinstance(given, str):
            python_objects.check(f"task '{task.name}': metric {name}", python_objects.to_the_end(measured[name]), classes)


def _check_old_heads(prepared: Sequence[PreparedTask]) -> None:
    """The tasks whose heads are kept leave files beside those of the run, so that each needs a name of its own."""
    names = {task.name for task in prepared}
    kept: set[str] = set()
    for task in prepared:
        for lesson in task.lessons.values():
            name = lesson.teacher.task
            if lesson.old_head is None:
                continue
            if name in names:
                raise errors.ConfigError(
                    f"two heads have the name '{name}': one of a task of this run, and one that is kept for a teacher; "
                    "rename the task of this run"
                )
            if name in kept:
                raise errors.ConfigError(f"two heads have the name '{name}': only one term can keep the head of '{name}'")
            kept.add(name)
