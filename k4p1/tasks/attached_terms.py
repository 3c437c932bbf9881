"""Loss terms that are no function of batch and outputs alone: they attach teachers or further outputs to the task model."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import tensorflow as tf

from k4p1.engine.metrics import Batch, Metric, Outputs
from k4p1.patches.patched_model import PatchedModel
from k4p1.tasks import distillation, tailoring
from k4p1.tasks.distillation import Teacher


class Attached(Protocol):
    """A term that was attached to a task model."""

    def loss(self, batch: Batch, outputs: Outputs) -> tf.Tensor:
        """One value per example, (batch,)."""

    def metrics(self) -> Mapping[str, Metric]:
        """What evaluation measures beside the term, by name."""


OPTIONS: dict[str, Callable[..., None]] = {
    distillation.NAME: distillation.distillation_options,
    tailoring.COMPLEXITY: tailoring.complexity_options,
    tailoring.BLOCK_DISTILLATION: tailoring.block_distillation_options,
}
"""The terms by name: functions whose keyword-only options are theirs."""
WITH_TEACHER = (distillation.NAME, tailoring.BLOCK_DISTILLATION)


def attach(
    patched: PatchedModel,
    term: str,
    options: Mapping[str, Any],
    *,
    number: int,
    task: str,
    labels: tuple[str, ...],
    teachers: Mapping[str, Teacher],
    fingerprint: str,
) -> tuple[PatchedModel, Attached]:
    """A task model to which a term is attached, and the term.

    Args:
      patched: the task model.
      term: its name, one of `OPTIONS`.
      options: of the term.
      number: its position in the loss.
      task: name of the task.
      labels: its class names.
      teachers: by path.
      fingerprint: of the run's backbone before it is trained.
    """
    if term == tailoring.COMPLEXITY:
        return tailoring.attach_complexity(patched, task, **options)
    how = {key: value for key, value in options.items() if key != "teacher"}
    teacher = teachers[options["teacher"]]
    if term == tailoring.BLOCK_DISTILLATION:
        return tailoring.attach_blocks(patched, task, labels, teacher, number=number, **how)
    return distillation.attach(patched, task, labels, teacher, number=number, fingerprint=fingerprint, **how)
