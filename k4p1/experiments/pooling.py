"""Statistics of several tasks as those of one population."""

from collections.abc import Sequence

import numpy as np

from k4p1.engine.packing import Packing


def pool_statistics(packing: Packing, vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Pools means and variances, each task with the same weight: `mean = E[m_t]`, `variance = E[v_t + m_t^2] - mean^2`.

    Args:
      packing: of a statistics group, with `.../moving_mean` beside each `.../moving_variance`.
      vectors: one a task.
    """
    if len(vectors) == 1:
        return vectors[0]
    tasks = [{name: value.astype(np.float64) for name, value in packing.unpack_numpy(v).items()} for v in vectors]
    pooled = {}
    for name in packing.names:
        value = np.mean([task[name] for task in tasks], axis=0)
        if name.endswith("moving_variance"):
            mean_name = name.removesuffix("variance") + "mean"
            means = np.stack([task[mean_name] for task in tasks])
            value = value + np.mean(means**2, axis=0) - np.mean(means, axis=0) ** 2
        pooled[name] = value
    return packing.pack_numpy(pooled)
