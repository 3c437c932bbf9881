"""Metrics of a task over a data set, and the population statistics of its batch normalisations."""

import itertools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.data_errors import data_errors
from k4p1.engine.groups import STATISTICS
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


def recalibrate(
    task: PureTask,
    vectors: Mapping[str, np.ndarray],
    momentum: Mapping[str, float],
    chosen: frozenset[str],
    batches: Iterable,
    count: int,
) -> dict[str, np.ndarray]:
    """Population statistics of batch normalisation in place of moving averages.

    Forward passes with batch statistics over `count` batches of images that are not augmented. With batch mean m_b and
    variance v_b: `mean = E[m_b]`, `variance = E[v_b + m_b^2] - mean^2`; the last two terms are the variance between batches.

    Args:
      task: the task as a pure function.
      vectors: by group name.
      momentum: of every statistics parameter, by key.
      chosen: keys of the statistics to replace; others keep their values.
      batches: of the training split, full ones.
      count: how many to use.

    Returns:
      New vectors of the statistics groups that hold chosen parameters.
    """
    groups = [g for g in task.groups if g.role == STATISTICS and chosen & set(g.packing.names)]
    if not groups:
        return {}
    fixed = {g.name: tf.constant(vectors[g.name]) for g in task.groups}
    # From zero, one training pass leaves (1 - momentum) times the batch statistics.
    fixed |= {g.name: tf.zeros([g.packing.size]) for g in groups}
    passed = tf.function(lambda batch: task.forward(fixed, batch["inputs"], training=True).statistics)
    sums = {g.name: {name: [0.0, 0.0] for name in g.packing.names} for g in groups}
    used = 0
    for batch in itertools.islice(batches, count):
        statistics = passed(batch)
        used += 1
        for group in groups:
            values = group.packing.unpack_numpy(statistics[group.name].numpy().astype(np.float64))
            for name, value in values.items():
                value = value / (1.0 - momentum[name])
                sums[group.name][name][0] += value
                sums[group.name][name][1] += value**2
    if not used:
        raise errors.DataError(f"task '{task.name}': no training batch to recalibrate batch normalisation with")
    return {
        g.name: _population(g.packing.unpack_numpy(vectors[g.name]), sums[g.name], used, chosen, g.packing.pack_numpy)
        for g in groups
    }


def _population(old, sums, used, chosen, pack):
    new = dict(old)
    for name in chosen & set(old):
        value = sums[name][0] / used
        if name.endswith("moving_variance"):
            mean, mean_square = (total / used for total in sums[name.removesuffix("variance") + "mean"])
            value = np.maximum(value + mean_square - mean**2, 0.0)
        new[name] = value
    return pack(new)
