"""Patched batch normalisation against `keras.layers.BatchNormalization`: outputs, gradients and statistics."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from k4p1.patches.patched_batch_normalization import PatchedBatchNormalization


def shared_layer(channels=5, axis=-1, **options):
    layer = layers.BatchNormalization(axis=axis, momentum=0.8, **options)
    shape = [None, 4, 4, 4]
    shape[axis] = channels
    layer.build(shape)
    random = np.random.default_rng(0)
    for variable in layer.variables:
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return layer


def images(channels=5, axis=-1, dtype="float32"):
    shape = [6, 4, 4, 4]
    shape[axis] = channels
    return tf.constant(np.random.default_rng(1).normal(2.0, 3.0, shape), dtype)


def output_and_gradients(layer, x, **arguments):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, **arguments)
        loss = tf.reduce_sum(tf.sin(tf.cast(y, "float32") + tf.range(y.shape[-1], dtype="float32")))
    gradients = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
    return y, dict(zip(["x", *(v.name for v in layer.trainable_variables)], gradients, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", [-1, 3, 1])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"epsilon": 0.1}], ids=str)
def test_outputs_gradients_and_statistics_are_those_of_keras(training, axis, options):
    keras_layer = shared_layer(axis=axis, **options)
    patched = PatchedBatchNormalization(shared_layer(axis=axis, **options), momentum=0.8)
    x = images(axis=axis)
    y, gradients = output_and_gradients(keras_layer, x, training=training)
    y_patched, gradients_patched = output_and_gradients(patched, x, training=training)
    np.testing.assert_allclose(y_patched, y, atol=1e-5)
    assert set(gradients_patched) == {"x", "gamma", "beta"}
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradients_patched[name], gradient, atol=1e-4, rtol=1e-4, err_msg=name)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(getattr(patched, name), getattr(keras_layer, name), rtol=1e-5, err_msg=name)


def test_frozen_statistics_give_the_gradient_of_inference_mode():
    patched = PatchedBatchNormalization(shared_layer(), statistics="frozen")
    x = images()
    gradients = [output_and_gradients(patched, x, training=training)[1] for training in (True, False)]
    for name in ("x", "gamma", "beta"):
        np.testing.assert_array_equal(gradients[0][name], gradients[1][name])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_normalises_in_float32(policy):
    """Half precision in and out; statistics of numbers whose square float16 cannot hold."""
    keras.config.set_dtype_policy(policy)
    patched = PatchedBatchNormalization(shared_layer(), momentum=0.0)
    x = images(dtype=patched.compute_dtype) * 200.0
    y, gradients = output_and_gradients(patched, x, training=True)
    assert y.dtype == patched.compute_dtype
    assert np.isfinite(np.array(keras.ops.cast(y, "float32"))).all()
    wide = np.array(keras.ops.cast(x, "float32"))
    np.testing.assert_allclose(patched.moving_variance, wide.var(axis=(0, 1, 2)), rtol=1e-3)
    assert gradients["gamma"].dtype == "float32"
    assert np.isfinite(np.array(keras.ops.cast(gradients["x"], "float32"))).all()


def test_private_statistics_start_from_the_shared_ones_and_leave_them():
    shared = shared_layer()
    before = [np.array(v) for v in shared.variables]
    patched = PatchedBatchNormalization(shared)
    patched.build((None, 4, 4, 5))
    np.testing.assert_array_equal(patched.moving_mean, shared.moving_mean)
    patched(images(), training=True)
    assert not np.array_equal(patched.moving_mean, before[2])
    for variable, value in zip(shared.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
