"""Opens the data of a run's tasks and builds their models on one backbone."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import keras

from k4p1 import errors
from k4p1.backbones.backbone import Backbone
from k4p1.data.open_source import open_source
from k4p1.data.pipeline import Pipeline
from k4p1.data.splits import Splits
from k4p1.patches.apply import apply_patches, head_is_shared
from k4p1.patches.patched_layer import TRAINED
from k4p1.patches.patched_model import PatchedModel
from k4p1.tasks.losses import MeanLoss, Metrics
from k4p1.tasks.task import Task
from k4p1.tasks.teacher import Teacher


class Start(Protocol):
    """The values that a task starts from: adapter factors and head, where it shares them, and the rest."""

    factors: Mapping[str, keras.Variable]
    head: keras.layers.Dense | None

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
      loss, metrics: of (batch, logits).
      steps: step target.
    """

    task: Task
    labels: tuple[str, ...]
    pipeline: Pipeline
    splits: Splits
    patched: PatchedModel
    loss: Callable
    metrics: Callable
    steps: int

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    def only_head_trains(self) -> bool:
        """Whether features never change: only the head is trained, with fixed preprocessing."""
        if self.task.teacher:  # it looks at images
            return False
        moving = [p for p in self.patched.parameters if p.role in (TRAINED, "statistics")]
        return bool(moving) and all(p.kind == "head" for p in moving) and not self.pipeline.augmented


def prepare_tasks(
    backbone: Backbone,
    tasks: Sequence[Task],
    *,
    shared_trained: bool,
    steps: int | None = None,
    seed: int = 0,
    starts: Mapping[str, Start] | None = None,
    teachers: Mapping[str, Teacher] | None = None,
) -> list[PreparedTask]:
    """Prepares the tasks of a run.

    Args:
      backbone: shared by all.
      tasks: with distinct names.
      shared_trained: whether shared weights are learned.
      steps: step target of a task of weight 1 that names none.
      seed: of heads, validation splits and data order.
      starts: values that tasks start from, by task.
      teachers: of tasks that learn by distillation.

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
    if steps is not None and steps <= 0:
        raise errors.ConfigError(f"steps={steps}: wanted a positive number")
    shared_heads: dict[tuple[str, ...], keras.layers.Dense] = {}
    prepared = []
    for task in tasks:
        task_seed = zlib.crc32(f"{seed}/{task.name}".encode()) & 0x7FFFFFFF
        source = open_source(task.data, task.data_dir)
        splits = Splits(source, seed=seed, validation=task.validation)
        start = (starts or {}).get(task.name)
        teacher = (teachers or {}).get(task.name)
        labels = teacher.labels if teacher else source.labels
        patched = apply_patches(
            backbone,
            task.patch,
            classes=len(labels),
            image_size=task.image_size,
            shared_trained=shared_trained,
            shared_head=shared_heads.get(labels) or (start.head if start else None),
            factors=start.factors if start else None,
            dropout=task.dropout,
            seed=task_seed,
            name=task.name,
        )
        if start:
            start.write(patched)
        if head_is_shared(patched.spec):
            shared_heads.setdefault(labels, patched.head)
        pipeline = Pipeline(
            source,
            splits,
            patched.image_size,
            task.batch_size,
            len(source.labels),
            augment=task.augment,
            seed=task_seed,
            cache=task.cache,
        )
        loss: Callable = MeanLoss(task.loss, task.label_smoothing)
        metrics: Callable = Metrics(task.metrics, task.loss)
        if teacher:
            teacher.check(task.name, patched.image_size)
            loss, metrics = teacher.of(loss), teacher.of(metrics)
        target = task.step_target(steps, splits.size("train"))
        prepared.append(PreparedTask(task, labels, pipeline, splits, patched, loss, metrics, target))
    return prepared
