"""Metrics of a task over a data set."""

from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.data_errors import data_errors
from k4p1.engine.metrics import Metric
from k4p1.engine.pure import PureTask


class Evaluator:
    """Evaluates a task on vectors that are handed in, so that it can look at any snapshot.

    Args:
      task: the task as a pure function.
      metrics: by name.
    """

    def __init__(self, task: PureTask, metrics: Mapping[str, Metric]):
        self._task, self._metrics = task, dict(metrics)
        self._measured = tf.function(self._measure, reduce_retracing=True)

    def _measure(self, vectors, batch):
        outputs = self._task.forward(vectors, batch["inputs"], training=False).outputs
        measured = {name: metric.measure(batch, outputs) for name, metric in self._metrics.items()}
        return measured, tf.reduce_sum(batch["weight"])

    def __call__(self, vectors: Mapping[str, np.ndarray], batches: Iterable) -> dict[str, float]:
        """The metrics over all examples; `examples` is their number (corrupt images do not count).

        Raises:
          DataError: no image could be read.
        """
        on_device = {group.name: tf.constant(vectors[group.name]) for group in self._task.groups}
        found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in self._metrics}
        examples = 0.0
        with data_errors(self._task.name):
            for batch in batches:
                measured, weight = self._measured(on_device, batch)
                for name, values in measured.items():
                    for part, value in values.items():
                        self._add(found[name], part, value.numpy(), self._metrics[name].gathered)
                examples += float(weight)
        if not examples:
            raise errors.DataError(f"task '{self._task.name}': no image of the split could be read")
        totals = {
            name: {
                part: np.concatenate(values) if self._metrics[name].gathered else values[0] for part, values in parts.items()
            }
            for name, parts in found.items()
        }
        return {**{name: self._metrics[name].result(total) for name, total in totals.items()}, "examples": examples}

    @staticmethod
    def _add(found: dict[str, list[np.ndarray]], part: str, value: np.ndarray, gathered: bool) -> None:
        listed = found.setdefault(part, [])
        if gathered:
            listed.append(np.atleast_1d(value))
        elif listed:
            listed[0] = listed[0] + value
        else:
            listed.append(np.asarray(value, np.float64))
