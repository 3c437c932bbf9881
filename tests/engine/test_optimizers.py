"""The fused updates are those of Keras' optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.engine import optimizers

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


def test_names_and_settings_are_checked():
    assert optimizers.make("sgd", momentum=0.5) == optimizers.SGD(momentum=0.5)
    with pytest.raises(errors.ConfigError, match="did you mean 'rmsprop'"):
        optimizers.make("rmsprob")
    with pytest.raises(errors.ConfigError, match="did you mean 'momentum'"):
        optimizers.make("sgd", momentun=0.5)
