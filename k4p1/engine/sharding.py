"""A flat vector cut into nearly equal shards, one per device."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf


class ShardedVector:
    """A float32 vector (n,) as shards of n / k values (rounded up or down) on k devices; load is balanced by construction.

    Args:
      initial: its first values.
      devices: one per shard; None stands for TensorFlow's default. A vector shorter than that uses the first ones.
      name: of the variables.
      trainable: as in `tf.Variable`.
    """

    def __init__(self, initial: np.ndarray, devices: Sequence[str | None], name: str, trainable: bool = False):
        pieces = [piece for piece in np.array_split(initial, len(devices)) if piece.size]
        self.sizes = [piece.size for piece in pieces]
        self.shards = []
        for number, (piece, device) in enumerate(zip(pieces, devices, strict=False)):
            with tf.device(device):
                self.shards.append(tf.Variable(piece, trainable=trainable, name=f"{name}_{number}", dtype=tf.float32))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n,)."""
        return (sum(self.sizes),)

    def read(self) -> tf.Tensor:
        """The present values, on the device that runs the step."""
        parts = [shard.read_value() for shard in self.shards]
        return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)

    def split(self, vector: tf.Tensor) -> list[tf.Tensor]:
        """The pieces of a vector (n,) that belong to the shards."""
        return [vector] if len(self.sizes) == 1 else tf.split(vector, self.sizes)

    def add(self, delta: tf.Tensor) -> None:
        """Adds to the vector; atomic in every shard."""
        for shard, piece in zip(self.shards, self.split(delta), strict=True):
            with tf.device(shard.device):
                shard.assign_add(piece)

    def numpy(self) -> np.ndarray:
        """The present values, on the host."""
        return np.concatenate([shard.numpy() for shard in self.shards])

    def assign(self, values: np.ndarray) -> None:
        """Sets the values."""
        for shard, piece in zip(self.shards, np.split(np.asarray(values), np.cumsum(self.sizes)[:-1]), strict=True):
            shard.assign(piece)
