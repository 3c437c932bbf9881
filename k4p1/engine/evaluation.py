"""Metrics of a task over a data set."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.data_errors import data_errors
from k4p1.engine.pure import PureTask

Metrics = Callable[[Mapping[str, tf.Tensor], tf.Tensor], Mapping[str, tf.Tensor]]


class Evaluator:
    """Evaluates a task on vectors that are handed in, so that it can look at any snapshot.

    Args:
      task: the task as a pure function.
      metrics: of (batch, logits): per-example values (batch,) by name.
    """

    def __init__(self, task: PureTask, metrics: Metrics):
        self._task, self._metrics = task, metrics
        self._sums = tf.function(self._sum_batch, reduce_retracing=True)

    def _sum_batch(self, vectors, batch):
        logits = self._task.forward(vectors, batch["inputs"], training=False).logits
        weights = batch["weight"]
        sums = {name: tf.reduce_sum(weights * value) for name, value in self._metrics(batch, logits).items()}
        return sums, tf.reduce_sum(weights)

    def __call__(self, vectors: Mapping[str, np.ndarray], batches: Iterable) -> dict[str, float]:
        """Mean metrics over all examples; `examples` is their number (corrupt images do not count)."""
        on_device = {group.name: tf.constant(vectors[group.name]) for group in self._task.groups}
        totals: dict[str, float] = {}
        examples = 0.0
        with data_errors(self._task.name):
            for batch in batches:
                sums, weight = self._sums(on_device, batch)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + float(value)
                examples += float(weight)
        if not examples:
            raise errors.DataError(f"task '{self._task.name}': no image of the split could be read")
        return {**{name: total / examples for name, total in totals.items()}, "examples": examples}
