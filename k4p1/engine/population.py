"""Population statistics of batch normalisation in place of moving averages.

Moving averages arrive late: with momentum 0.99 they still carry 5% of their first value after 300 steps, with the 0.999 of
MobileNetV2 74%. So every evaluation, selection on validation splits included, replaces them first.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.data_errors import data_errors
from k4p1.engine.groups import STATISTICS, ParameterGroup
from k4p1.engine.packing import Packing
from k4p1.engine.pure import PureTask

OF_SHARED = ("pooled", "mean", "moving")


class PopulationStatistics:
    """Measures the statistics of a run's tasks by forward passes with batch statistics.

    With mean m_b and variance v_b of each batch: `mean = E[m_b]`, `variance = E[v_b + m_b^2] - mean^2`; the last two terms
    are the variance between batches. Statistics that several tasks share are pooled in the same way, each task with the
    same weight.

    Args:
      tasks: of the run; `PureTask.recalibrated` says which statistics are replaced, others keep their values.
      batches: by task: training batches that are not augmented.
    """

    def __init__(self, tasks: Sequence[PureTask], batches: Mapping[str, Callable[[], Iterable]]):
        self._tasks = [task for task in tasks if _moving(task)]
        self._batches = batches
        self._passes = {task.name: tf.function(_pass_of(task), reduce_retracing=True) for task in self._tasks}

    def __call__(self, vectors: Mapping[str, np.ndarray], count: int, of_shared: str = "pooled") -> dict[str, np.ndarray]:
        """`vectors` with population statistics.

        Args:
          vectors: by group.
          count: batches per task.
          of_shared: what becomes of statistics that several tasks share: `pooled`; `mean`, `E_t[v_t]` without the variance
            between tasks; `moving`, the moving averages as training left them.
        """
        measured: dict[str, list[np.ndarray]] = {}
        for task in self._tasks:
            for name, vector in self._measure(task, vectors, count).items():
                measured.setdefault(name, []).append(vector)
        packings = {group.name: group.packing for task in self._tasks for group in _moving(task)}
        replaced = {}
        for name, found in measured.items():
            if len(found) == 1 or of_shared == "pooled":
                replaced[name] = pool(packings[name], found)
            elif of_shared == "mean":
                replaced[name] = np.mean(found, axis=0, dtype=np.float64).astype(np.float32)
        return {**vectors, **replaced}

    def _measure(self, task: PureTask, vectors: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        groups = _moving(task)
        on_device = {group.name: tf.constant(vectors[group.name]) for group in task.groups}
        # From zero, one training pass leaves (1 - momentum) times the batch statistics.
        on_device |= {group.name: tf.zeros([group.packing.size]) for group in groups}
        rest = {
            group.name: group.packing.pack_numpy(
                {name: np.full(shape, 1.0 - task.statistics_momentum[name]) for name, shape in _shapes(group)}
            ).astype(np.float64)
            for group in groups
        }
        batch_statistics: dict[str, list[np.ndarray]] = {group.name: [] for group in groups}
        with data_errors(task.name):
            for batch in itertools.islice(self._batches[task.name](), count):
                for name, vector in self._passes[task.name](on_device, batch["inputs"]).items():
                    if name in batch_statistics:
                        batch_statistics[name].append(vector.numpy() / rest[name])
        if not batch_statistics[groups[0].name]:
            raise errors.DataError(f"task '{task.name}': no training batch to recalibrate batch normalisation with")
        return {
            group.name: _keep_others(group, vectors[group.name], pool(group.packing, batch_statistics[group.name]), task)
            for group in groups
        }


def pool(packing: Packing, vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Means and variances of several samples of equal weight as those of one population.

    Args:
      packing: of a statistics group, with `.../moving_mean` beside each `.../moving_variance`.
      vectors: one per sample.
    """
    if len(vectors) == 1:
        return np.asarray(vectors[0], np.float32)
    stacked = np.stack(vectors).astype(np.float64)
    mean, mean_square = packing.unpack_numpy(stacked.mean(0)), packing.unpack_numpy((stacked**2).mean(0))
    pooled = dict(mean)
    for name in packing.names:
        if name.endswith("moving_variance"):
            of_mean = name.removesuffix("variance") + "mean"
            pooled[name] = np.maximum(mean[name] + mean_square[of_mean] - mean[of_mean] ** 2, 0.0)
    return packing.pack_numpy(pooled)


def _moving(task: PureTask) -> list[ParameterGroup]:
    return [g for g in task.groups if g.role == STATISTICS and task.recalibrated & set(g.packing.names)]


def _shapes(group: ParameterGroup) -> Iterable[tuple[str, tuple[int, ...]]]:
    return zip(group.packing.names, group.packing.shapes, strict=True)


def _pass_of(task: PureTask) -> Callable:
    return lambda vectors, inputs: task.forward(vectors, inputs, training=True).statistics


def _keep_others(group: ParameterGroup, old: np.ndarray, new: np.ndarray, task: PureTask) -> np.ndarray:
    before, after = group.packing.unpack_numpy(old), group.packing.unpack_numpy(new)
    return group.packing.pack_numpy({n: after[n] if n in task.recalibrated else before[n] for n in group.packing.names})
