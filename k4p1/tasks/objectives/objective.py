"""What a task is about: head, targets, loss terms, metrics and answers, all in one place."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from k4p1 import errors
from k4p1.data.targets import Targets
from k4p1.engine.metrics import Batch, Metric, Outputs
from k4p1.patches import task_head
from k4p1.patches.task_head import TaskHead

LossFunction = Callable[..., tf.Tensor]
"""A loss term: of (batch, outputs, **options), one value per example, (batch,); options are keyword-only, with defaults."""


class Objective(abc.ABC):
    """Head, targets, loss terms, metrics and exported answers of a sort of task. Register one of your own with `register`.

    Attributes:
      name: what tasks call it.
      loss_terms: by name.
      default_loss: a sum of terms, as text.
      metrics: by name.
      default_metrics: names; the first one selects the best checkpoint.
    """

    name: str
    loss_terms: Mapping[str, LossFunction]
    default_loss: str
    metrics: Mapping[str, Metric]
    default_metrics: tuple[str, ...]

    @abc.abstractmethod
    def head(self, labels: Sequence[str]) -> TaskHead:
        """The head, on the backbone's endpoints."""

    @abc.abstractmethod
    def targets(self, labels: Sequence[str]) -> Targets:
        """What is learned from an example, and how augmentation moves it."""

    @abc.abstractmethod
    def answers(self, outputs: Outputs) -> dict[str, tf.Tensor]:
        """What the exported model answers, by name: `outputs` of the task model, without batch, turned into answers."""

    def summary(self, answers: Mapping[str, Any], labels: Sequence[str], top: int) -> list[tuple[str, float]]:
        """The answers for one image as (text, number) pairs for people, the first `top` of them.

        Raises:
          ConfigError: the objective has no such summary.
        """
        raise errors.ConfigError(
            f"objective '{self.name}' has no summary of its answers; ask the exported model, or the model of load_task"
        )

    def measured(self, names: Sequence[str]) -> dict[str, Metric]:
        """Metrics by name.

        Raises:
          ConfigError: one that does not belong to the objective; the nearest name is shown.
        """
        for name in names:
            if name not in self.metrics:
                raise errors.ConfigError(errors.unknown(f"metric of objective '{self.name}'", name, self.metrics))
        return {name: self.metrics[name] for name in names}


_OBJECTIVES: dict[str, Objective] = {}


def register(objective: Objective) -> Objective:
    """Makes an objective known by its name, to tasks and to patch files.

    Raises:
      ConfigError: a default metric that it does not have, or a name that is taken.
    """
    objective.measured(objective.default_metrics)
    for name in ("loss", "examples"):
        if name in objective.metrics:
            raise errors.ConfigError(f"objective '{objective.name}': the metric name '{name}' is taken")
    for term in ("distillation", "block_distillation", "complexity"):
        if term in objective.loss_terms:
            raise errors.ConfigError(f"objective '{objective.name}': the loss term '{term}' is there for every objective")
    _OBJECTIVES[objective.name] = objective
    task_head.register(objective.name, objective.head)
    return objective


def find(objective: str | Objective) -> Objective:
    """The objective of a name.

    Raises:
      ConfigError: unknown; the nearest name is shown.
    """
    if isinstance(objective, Objective):
        if _OBJECTIVES.get(objective.name) is not objective:
            raise errors.ConfigError(
                f"objective '{objective.name}' is not registered, so files could not name it; call k4p1.register_objective"
            )
        return objective
    if not isinstance(objective, str):
        raise errors.ConfigError(f"objective is {objective!r}; expected a name or a registered Objective")
    if objective not in _OBJECTIVES:
        raise errors.ConfigError(
            f"{errors.unknown('objective', objective, _OBJECTIVES)} (one of your own: {errors.imported()})"
        )
    return _OBJECTIVES[objective]


def known() -> dict[str, Objective]:
    """The registered objectives by name."""
    return dict(_OBJECTIVES)


__all__ = ["Batch", "LossFunction", "Metric", "Objective", "Outputs", "Targets", "TaskHead", "find", "known", "register"]
