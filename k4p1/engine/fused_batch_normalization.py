"""Batch normalisation in training by TensorFlow's fused kernel, for the layers that patches put into a network.

Operation by operation, forward and backward pass read and write the activations many times over; the fused kernel does not
(`engine_over_loop` of `benchmarks/local.py` contains the difference). Layers themselves know only `keras.ops`, so that they
run on every backend of Keras; the engine, which is TensorFlow, lends them this function.
"""

import tensorflow as tf

from k4p1.patches import patched_batch_normalization


def normalise_batch(x: tf.Tensor, gamma, beta, axis: int, epsilon: float):
    """`patched_batch_normalization.normalise_batch`, fused for images (batch, height, width, channels)."""
    if x.shape.rank != 4 or axis not in (-1, 3) or x.dtype != tf.float32:
        return patched_batch_normalization.normalise_batch(x, gamma, beta, axis, epsilon)
    channels = x.shape[-1]
    y, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.ones([channels]) if gamma is None else tf.cast(gamma, tf.float32),
        offset=tf.zeros([channels]) if beta is None else tf.cast(beta, tf.float32),
        mean=tf.zeros([0]),
        variance=tf.zeros([0]),
        epsilon=epsilon,
        is_training=True,
    )
    count = tf.cast(tf.size(x) // channels, tf.float32)
    return y, mean, unbiased * (count - 1.0) / count
