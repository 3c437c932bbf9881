"""Several tensors as one flat float32 vector, in a fixed order."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each named tensor stands in the vector.

    Attributes:
      names: of the tensors, in order.
      shapes: of the tensors, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """The number of values of each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """The length of the vector."""
        return sum(self.sizes)

    def unpack(self, vector: tf.Tensor) -> dict[str, tf.Tensor]:
        """The tensors by name, from a vector (size,)."""
        parts = tf.split(vector, self.sizes) if self.names else []
        return {n: tf.reshape(part, shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def pack(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """A float32 vector (size,) of tensors in order."""
        return tf.concat([tf.reshape(tf.cast(t, tf.float32), [-1]) for t in tensors], axis=0)

    def pack_numpy(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same on the host, from arrays by name."""
        return np.concatenate([np.ravel(np.asarray(tensors[n], np.float32)) for n in self.names])

    def unpack_numpy(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays by name."""
        parts = np.split(np.asarray(vector), np.cumsum(self.sizes)[:-1])
        return {n: part.reshape(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}
