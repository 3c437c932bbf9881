"""What tasks on one backbone differ in, as tables with a row per task, for layers that answer for many tasks at once.

A folded layer of a task computes `f_t * x + b_t`. Where a patch only scales, `f_t = s_t f` per output channel with the
shared kernel f: the table holds the vectors s_t and b_t. Where it changes the kernel otherwise (a mask, an adapter, a
private kernel), the table holds f_t for the tasks that do.
"""

import keras
import numpy as np
import tensorflow as tf

from k4p1.patches.inference import Values, per_output_channel

_TOLERANCE = 1e-6


class Table:
    """Rows of equal shape in one variable; it doubles when it is full.

    Args:
      shape: of a row.
      name: of the variable.
    """

    def __init__(self, shape: tuple[int, ...], name: str):
        self.variable = tf.Variable(tf.zeros((1, *shape)), trainable=False, name=name)

    @property
    def capacity(self) -> int:
        """The number of rows."""
        return self.variable.shape[0]

    def write(self, row: int, value: np.ndarray) -> None:
        """Writes a row, within the capacity."""
        self.variable.scatter_nd_update([[row]], tf.constant(value[None], tf.float32))

    def grow(self, capacity: int) -> None:
        """Makes room for so many rows; a new variable, so that graphs that hold the old one stay whole."""
        if capacity > self.capacity:
            more = tf.zeros((capacity - self.capacity, *self.variable.shape[1:]))
            self.variable = tf.Variable(
                tf.concat([self.variable, more], 0), trainable=False, name=self.variable.name.split(":")[0]
            )

    def rows(self, rows: tf.Tensor) -> tf.Tensor:
        """The rows of (n,) numbers."""
        return tf.gather(self.variable, rows)


class LayerTable:
    """The values of all tasks in one convolution or dense layer.

    Args:
      layer: of the backbone, with the shared kernel.
    """

    def __init__(self, layer: keras.layers.Layer):
        self.layer = layer
        self.shared = kernel = np.asarray(keras.ops.convert_to_numpy(layer.kernel), np.float64)
        channels = int(np.prod(kernel.shape[-2:])) if isinstance(layer, keras.layers.DepthwiseConv2D) else kernel.shape[-1]
        self.scale = Table((channels,), f"{layer.name}_scale")
        self.bias = Table((channels,), f"{layer.name}_bias")
        self.slots = tf.Variable([-1], trainable=False, dtype=tf.int32, name=f"{layer.name}_slots")
        self.kernels: Table | None = None
        self._free: list[int] = []

    def write(self, row: int, values: Values) -> None:
        """Writes the folded values of a task into a row."""
        kernel = values["kernel"]
        scale = scale_between(self.layer, self.shared, kernel)
        self.bias.write(row, np.broadcast_to(values.get("bias", 0.0), self.bias.variable.shape[1:]))
        self.scale.write(row, np.ones(self.scale.variable.shape[1:]) if scale is None else scale)
        slot = int(self.slots[row])
        if scale is not None:
            self._release(row, slot)
            return
        if self.kernels is None:
            self.kernels = Table(kernel.shape, f"{self.layer.name}_kernels")
            self._free = [0]
        if slot < 0:
            if not self._free:
                before = self.kernels.capacity
                self.kernels.grow(2 * before)
                self._free = list(range(before, 2 * before))
            slot = self._free.pop(0)
        self.kernels.write(slot, kernel)
        self.slots.scatter_nd_update([[row]], [slot])

    def clear(self, row: int) -> None:
        """Frees what a row holds beside its vectors."""
        self._release(row, int(self.slots[row]))

    def grow(self, capacity: int) -> None:
        """Makes room for so many tasks."""
        self.scale.grow(capacity)
        self.bias.grow(capacity)
        if capacity > self.slots.shape[0]:
            more = tf.fill([capacity - self.slots.shape[0]], -1)
            self.slots = tf.Variable(tf.concat([self.slots, more], 0), trainable=False, dtype=tf.int32)

    def _release(self, row: int, slot: int) -> None:
        if slot >= 0:
            self._free.append(slot)
            self.slots.scatter_nd_update([[row]], [-1])


def scale_between(layer: keras.layers.Layer, shared: np.ndarray, kernel: np.ndarray) -> np.ndarray | None:
    """The factor per output channel by which a kernel differs from the shared one; None where it differs otherwise."""
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        flat = shared.reshape(-1, int(np.prod(shared.shape[-2:]))), kernel.reshape(-1, int(np.prod(shared.shape[-2:])))
    else:
        flat = shared.reshape(-1, shared.shape[-1]), kernel.reshape(-1, shared.shape[-1])
    power = np.sum(flat[0] ** 2, axis=0)
    scale = np.where(power > 0, np.sum(flat[0] * flat[1], axis=0) / np.where(power > 0, power, 1.0), 1.0)
    again = shared * per_output_channel(layer, scale, shared)
    close = np.max(np.abs(again - kernel), initial=0.0) <= _TOLERANCE * max(1e-12, np.max(np.abs(kernel), initial=0.0))
    return scale if close else None


def widened(values: np.ndarray, width: int, fill: float = 0.0) -> np.ndarray:
    """An array filled up to `width` along its last axis."""
    missing = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, missing, constant_values=fill)
