"""Metrics of a task over a split: means over examples, or quantities accumulated over all of it."""

import abc
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

Batch = Mapping[str, tf.Tensor]
Outputs = Mapping[str, tf.Tensor]


class Metric(abc.ABC):
    """A number that says how good a task model is on a split.

    `measure` runs in the graph, once per batch; what it returns is summed over batches, or concatenated where `gathered`.
    `result` turns that into the number. Examples that could not be read have weight 0 in `batch["weight"]`.

    Attributes:
      larger_is_better: whether selection looks for the largest value.
      gathered: whether measurements are concatenated along their first axis in place of summed.
    """

    larger_is_better: bool = True
    gathered: bool = False

    @abc.abstractmethod
    def measure(self, batch: Batch, outputs: Outputs) -> dict[str, tf.Tensor]:
        """What a batch adds, by name."""

    @abc.abstractmethod
    def result(self, measured: Mapping[str, np.ndarray]) -> float:
        """The metric of all batches together."""


class PerExample(Metric):
    """`sum_i w_i m_i / sum_i w_i` for one value m_i per example.

    Args:
      function: of (batch, outputs): (batch,).
      larger_is_better: see `Metric`.
    """

    def __init__(self, function: Callable[[Batch, Outputs], tf.Tensor], larger_is_better: bool = True):
        self._function, self.larger_is_better = function, larger_is_better

    def measure(self, batch, outputs):
        weights = batch["weight"]
        return {"sum": tf.reduce_sum(weights * self._function(batch, outputs)), "weight": tf.reduce_sum(weights)}

    def result(self, measured):
        return float(measured["sum"] / measured["weight"])
