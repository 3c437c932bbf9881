"""The fused updates are those of Keras' optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.engine import optimizers, schedules
from k4p1.engine.rules import shrinkage

UPDATES = 50
PAIRS = {
    "sgd": (optimizers.SGD(), lambda: keras.optimizers.SGD(0.1)),
    "momentum": (optimizers.SGD(momentum=0.9), lambda: keras.optimizers.SGD(0.1, momentum=0.9)),
    "nesterov": (
        optimizers.SGD(momentum=0.9, nesterov=True),
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (optimizers.RMSProp(), lambda: keras.optimizers.RMSprop(0.01)),
    "k4p1_rmsprop": (
        optimizers.RMSProp(momentum=0.9, epsilon=1.0),
        lambda: keras.optimizers.RMSprop(0.045, momentum=0.9, epsilon=1.0),
    ),
    "adam": (optimizers.Adam(), lambda: keras.optimizers.Adam(0.01)),
    "adamw": (optimizers.AdamW(), lambda: keras.optimizers.AdamW(0.01, weight_decay=0.004)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_fifty_updates_equal_keras(name):
    ours, make_theirs = PAIRS[name]
    theirs = make_theirs()
    random = np.random.default_rng(0)
    start = random.normal(size=20).astype(np.float32)
    vector, reference = tf.Variable(start), keras.Variable(start)
    slots = {slot: tf.Variable(tf.zeros(20)) for slot in ours.slots}
    theirs.build([reference])
    decay = getattr(ours, "default_weight_decay", 0.0)
    for update in range(1, UPDATES + 1):
        gradient = tf.constant(random.normal(size=20), tf.float32)
        rate = tf.constant(float(theirs.learning_rate))
        ours.update(vector, slots, gradient, rate, tf.constant(update, tf.int64), decay)
        theirs.apply([gradient], [reference])
    np.testing.assert_allclose(vector.numpy(), reference.numpy(), atol=1e-5)
    assert np.abs(vector.numpy() - start).max() > 1e-3


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "rmsprop", "k4p1_rmsprop"])
def test_decay_of_sgd_and_rmsprop_is_a_part_of_the_gradient(name):
    """Fifty updates with decay equal fifty of Keras whose gradients hold `decay * w` already."""
    ours, make_theirs = PAIRS[name]
    theirs, decay = make_theirs(), 0.05
    random = np.random.default_rng(0)
    start = random.normal(size=20).astype(np.float32)
    vector, reference = tf.Variable(start), keras.Variable(start)
    slots = {slot: tf.Variable(tf.zeros(20)) for slot in ours.slots}
    theirs.build([reference])
    for update in range(1, UPDATES + 1):
        gradient = tf.constant(random.normal(size=20), tf.float32)
        rate = tf.constant(float(theirs.learning_rate))
        ours.update(vector, slots, gradient, rate, tf.constant(update, tf.int64), decay)
        theirs.apply([gradient + decay * reference.value], [reference])
    np.testing.assert_allclose(vector.numpy(), reference.numpy(), atol=1e-5)


def test_adam_with_decay_is_adamw_as_in_keras():
    theirs = keras.optimizers.Adam(0.01, weight_decay=0.1)
    vectors = [tf.Variable(tf.ones(4)) for _ in range(2)]
    reference = keras.Variable(np.ones(4, "float32"))
    theirs.build([reference])
    gradient = tf.constant([0.5, -0.5, 2.0, 0.0])
    for vector, optimizer in zip(vectors, (optimizers.Adam(), optimizers.AdamW()), strict=True):
        slots = {slot: tf.Variable(tf.zeros(4)) for slot in optimizer.slots}
        for update in range(1, 11):
            optimizer.update(vector, slots, gradient, tf.constant(0.01), tf.constant(update, tf.int64), 0.1)
    for _ in range(10):
        theirs.apply([gradient], [reference])
    for vector in vectors:
        np.testing.assert_allclose(vector.numpy(), reference.numpy(), atol=1e-5)


def test_decay_by_size_shrinks_an_adapter_that_learns_nothing_to_a_percent():
    """RA, section 4.1, for Aircraft: 3,334 images in batches of 128, 120 epochs, SGD with momentum 0.9, decay 0.002.

    Under a zero gradient alpha falls by `0.1 * 0.002 / (1 - 0.9)` a step, until the rate does. Outside the gradient, in the
    manner of AdamW, two thirds of it would be left.
    """
    steps, decay = 120 * 3334 // 128, shrinkage(3334)
    schedule, optimizer = schedules.Steps(at=(80, 100), of=120), optimizers.SGD(momentum=0.9)
    alpha, slots = tf.Variable(tf.ones(2)), {"momentum": tf.Variable(tf.zeros(2))}

    @tf.function
    def run():
        for step in tf.range(steps):
            rate = 0.1 * schedule.factor(tf.cast(step, tf.float32) / steps, (120.0,))
            optimizer.update(alpha, slots, tf.zeros(2), rate, tf.cast(step + 1, tf.int64), decay)

    run()
    assert decay == 0.002
    assert 0.008 < float(alpha[0]) < 0.02


def test_names_and_settings_are_checked():
    assert optimizers.make("sgd", momentum=0.5) == optimizers.SGD(momentum=0.5)
    with pytest.raises(errors.ConfigError, match="did you mean 'rmsprop'"):
        optimizers.make("rmsprob")
    with pytest.raises(errors.ConfigError, match="did you mean 'momentum'"):
        optimizers.make("sgd", momentun=0.5)
