"""Numbers in the headers of encoded images, read with TensorFlow operations."""

import tensorflow as tf

SEPARATE = {"_noinline": True}
"""For a `tf.function` that is a rare branch: inlined, its operations cost time even where it is not taken (0.3 ms)."""


def unsigned(data: tf.Tensor, position: tf.Tensor | int, size: int, little: tf.Tensor | bool = False) -> tf.Tensor:
    """The number in `size` bytes of `data` (n,) uint8 from `position` on, int64 scalar; bytes behind the end count as zero.

    Args:
      data: the bytes.
      position: of the first one.
      size: at most 7.
      little: whether the lowest byte comes first.
    """
    begin = tf.minimum(tf.cast(position, tf.int64), tf.size(data, tf.int64))
    part = tf.cast(data[begin : begin + size], tf.int64)
    digits = tf.concat([part, tf.zeros([size], tf.int64)], axis=0)[:size]
    ascending = [256**power for power in range(size)]
    return tf.reduce_sum(digits * tf.where(little, tf.constant(ascending, tf.int64), tf.constant(ascending[::-1], tf.int64)))
