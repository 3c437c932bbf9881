"""Losses and metrics against those of Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.tasks import losses

CLASSES = 7
EXAMPLES = 40


@pytest.fixture(scope="module")
def batch():
    return {
        "label": tf.constant(np.random.default_rng(1).integers(0, CLASSES, EXAMPLES), tf.int64),
        "weight": tf.constant(np.random.default_rng(2).integers(0, 2, EXAMPLES), tf.float32),
    }


@pytest.fixture(scope="module")
def logits():
    return tf.constant(np.random.default_rng(3).normal(0, 3, (EXAMPLES, CLASSES)), tf.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_softmax_cross_entropy(batch, logits, smoothing):
    wanted = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing, reduction=None)(
        keras.ops.one_hot(batch["label"], CLASSES), logits
    )
    found = losses.softmax_cross_entropy(batch, logits, smoothing)
    assert found.shape == (EXAMPLES,)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sigmoid_cross_entropy(batch, logits, smoothing):
    wanted = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=smoothing, reduction=None)(
        keras.ops.one_hot(batch["label"], CLASSES), logits
    )
    found = losses.sigmoid_cross_entropy(batch, logits, smoothing)
    assert found.shape == (EXAMPLES,)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_accuracy(batch, logits):
    wanted = keras.metrics.sparse_categorical_accuracy(batch["label"], logits)
    np.testing.assert_array_equal(losses.accuracy(batch, logits), wanted)
    assert 0 < float(np.mean(wanted)) < 1


def test_top5_accuracy(batch, logits):
    wanted = keras.metrics.sparse_top_k_categorical_accuracy(batch["label"], logits, k=5)
    np.testing.assert_array_equal(losses.top5_accuracy(batch, logits), wanted)
    assert float(np.mean(losses.accuracy(batch, logits))) < float(np.mean(wanted)) < 1


def test_top5_accuracy_of_fewer_classes_is_one():
    batch = {"label": tf.constant([0, 1], tf.int64)}
    assert losses.top5_accuracy(batch, tf.constant([[0.0, 1.0], [3.0, 2.0]])).numpy().tolist() == [1.0, 1.0]


class TestMeanLoss:
    @pytest.mark.parametrize(
        ("name", "keras_loss"),
        [
            ("softmax_cross_entropy", keras.losses.CategoricalCrossentropy),
            ("sigmoid_cross_entropy", keras.losses.BinaryCrossentropy),
        ],
    )
    def test_is_the_mean_over_examples_of_weight_one(self, batch, logits, name, keras_loss):
        whole = batch["weight"].numpy() == 1
        wanted = keras_loss(from_logits=True, label_smoothing=0.1)(
            keras.ops.one_hot(batch["label"], CLASSES)[whole], logits[whole]
        )
        np.testing.assert_allclose(losses.MeanLoss(name, 0.1)(batch, logits), wanted, rtol=1e-5)

    def test_of_nothing_is_zero(self, batch, logits):
        empty = {**batch, "weight": tf.zeros_like(batch["weight"])}
        assert float(losses.MeanLoss("softmax_cross_entropy")(empty, logits)) == 0.0

    def test_an_example_of_weight_zero_has_no_gradient(self, batch, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = losses.MeanLoss("softmax_cross_entropy")(batch, logits)
        moved = np.abs(tape.gradient(loss, logits)).max(axis=1) > 0
        np.testing.assert_array_equal(moved, batch["weight"].numpy() == 1)

    def test_unknown_loss(self):
        with pytest.raises(errors.ConfigError, match="unknown loss 'sigmoid'; did you mean 'sigmoid_cross_entropy'"):
            losses.MeanLoss("sigmoid")

    @pytest.mark.parametrize("smoothing", [-0.1, 1.0])
    def test_label_smoothing_outside_its_range(self, smoothing):
        with pytest.raises(errors.ConfigError, match="wanted a number in"):
            losses.MeanLoss("softmax_cross_entropy", smoothing)


class TestMetrics:
    def test_give_one_value_an_example_and_the_loss(self, batch, logits):
        found = losses.Metrics(("top5_accuracy", "accuracy"), "sigmoid_cross_entropy")(batch, logits)
        assert list(found) == ["top5_accuracy", "accuracy", "loss"]
        assert all(value.shape == (EXAMPLES,) for value in found.values())
        np.testing.assert_array_equal(found["loss"], losses.sigmoid_cross_entropy(batch, logits))

    def test_unknown_metric(self):
        with pytest.raises(errors.ConfigError, match="unknown metric 'top_5_accuracy'; did you mean 'top5_accuracy'"):
            losses.Metrics(("accuracy", "top_5_accuracy"), "softmax_cross_entropy")
