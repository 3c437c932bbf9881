"""Losses and metrics against those of Keras."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.step import total
from k4p1.tasks.loss import TaskLoss
from k4p1.tasks.objectives import CLASSIFICATION, classification

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
@pytest.mark.parametrize(
    ("term", "of_keras"),
    [
        (classification.softmax_cross_entropy, keras.losses.CategoricalCrossentropy),
        (classification.sigmoid_cross_entropy, keras.losses.BinaryCrossentropy),
    ],
)
def test_cross_entropy(batch, logits, term, of_keras, smoothing):
    expected = of_keras(from_logits=True, label_smoothing=smoothing, reduction=None)(
        keras.ops.one_hot(batch["label"], CLASSES), logits
    )
    found = term(batch, {"logits": logits}, label_smoothing=smoothing)
    assert found.shape == (EXAMPLES,)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_accuracy(batch, logits):
    expected = keras.metrics.sparse_categorical_accuracy(batch["label"], logits)
    np.testing.assert_array_equal(classification.accuracy(batch, {"logits": logits}), expected)
    assert 0 < float(np.mean(expected)) < 1


def test_top5_accuracy(batch, logits):
    expected = keras.metrics.sparse_top_k_categorical_accuracy(batch["label"], logits, k=5)
    np.testing.assert_array_equal(classification.top5_accuracy(batch, {"logits": logits}), expected)
    assert float(np.mean(classification.accuracy(batch, {"logits": logits}))) < float(np.mean(expected)) < 1


def test_top5_accuracy_of_fewer_classes_is_one():
    batch = {"label": tf.constant([0, 1], tf.int64)}
    outputs = {"logits": tf.constant([[0.0, 1.0], [3.0, 2.0]])}
    assert classification.top5_accuracy(batch, outputs).numpy().tolist() == [1.0, 1.0]


class TestTaskLoss:
    @pytest.mark.parametrize(
        ("name", "keras_loss"),
        [
            ("softmax_cross_entropy", keras.losses.CategoricalCrossentropy),
            ("sigmoid_cross_entropy", keras.losses.BinaryCrossentropy),
        ],
    )
    def test_is_the_mean_over_examples_of_weight_one(self, batch, logits, name, keras_loss):
        whole = batch["weight"].numpy() == 1
        expected = keras_loss(from_logits=True, label_smoothing=0.1)(
            keras.ops.one_hot(batch["label"], CLASSES)[whole], logits[whole]
        )
        loss = TaskLoss.of(name, CLASSIFICATION, label_smoothing=0.1)
        np.testing.assert_allclose(total(loss(batch, {"logits": logits})), expected, rtol=1e-5)

    def test_of_nothing_is_zero(self, batch, logits):
        empty = {**batch, "weight": tf.zeros_like(batch["weight"])}
        assert float(total(TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)(empty, {"logits": logits}))) == 0.0

    def test_an_example_of_weight_zero_has_no_gradient(self, batch, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = total(TaskLoss.of("softmax_cross_entropy", CLASSIFICATION)(batch, {"logits": logits}))
        moved = np.abs(tape.gradient(loss, logits)).max(axis=1) > 0
        np.testing.assert_array_equal(moved, batch["weight"].numpy() == 1)

    @pytest.mark.parametrize(
        "given",
        [
            "softmax_cross_entropy + 0.5*sigmoid_cross_entropy(label_smoothing=0.2)",
            {"softmax_cross_entropy": 1.0, "sigmoid_cross_entropy(label_smoothing=0.2)": 0.5},
        ],
    )
    def test_is_a_weighted_sum_of_terms_by_name(self, batch, logits, given):
        outputs = {"logits": logits}
        loss = TaskLoss.of(given, CLASSIFICATION)
        terms = loss(batch, outputs)
        assert list(terms) == loss.names == ["softmax_cross_entropy", "sigmoid_cross_entropy"]
        alone = TaskLoss.of("sigmoid_cross_entropy(label_smoothing=0.2)", CLASSIFICATION)(batch, outputs)
        assert float(terms["sigmoid_cross_entropy"].value) == float(total(alone))
        both = float(terms["softmax_cross_entropy"].value) + 0.5 * float(terms["sigmoid_cross_entropy"].value)
        assert float(total(terms)) == pytest.approx(both)

    def test_evaluation_measures_without_smoothing_each_term_and_their_sum(self, batch, logits):
        outputs = {"logits": logits}
        given = "softmax_cross_entropy(label_smoothing=0.3) + 2*sigmoid_cross_entropy"
        metrics = TaskLoss.of(given, CLASSIFICATION).metrics()
        assert set(metrics) == {"loss", "loss_softmax_cross_entropy", "loss_sigmoid_cross_entropy"}
        found = {name: metric.result(metric.measure(batch, outputs)) for name, metric in metrics.items()}
        weights = batch["weight"].numpy()
        softmax = classification.softmax_cross_entropy(batch, outputs).numpy()
        assert found["loss_softmax_cross_entropy"] == pytest.approx((weights * softmax).sum() / weights.sum(), rel=1e-5)
        parts = found["loss_softmax_cross_entropy"] + 2 * found["loss_sigmoid_cross_entropy"]
        assert found["loss"] == pytest.approx(parts, rel=1e-5)

    def test_the_weight_of_a_single_term_counts(self, batch, logits):
        outputs = {"logits": logits}
        found = []
        for given in ("softmax_cross_entropy", "2.0*softmax_cross_entropy"):
            metric = TaskLoss.of(given, CLASSIFICATION).metrics()["loss"]
            found.append(metric.result(metric.measure(batch, outputs)))
        assert found[1] == pytest.approx(2 * found[0])

    def test_one_term_is_measured_as_loss_alone(self):
        assert list(TaskLoss.of("softmax_cross_entropy", CLASSIFICATION).metrics()) == ["loss"]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("sigmoid", "unknown loss term of objective 'classification' 'sigmoid'; did you mean 'sigmoid_cross_entropy'"),
            ("softmax_cross_entropy(smoothing=0.1)", "unknown option of loss term 'softmax_cross_entropy' 'smoothing'"),
            ("softmax_cross_entropy(label_smoothing=much)", "expected a number"),
            ("softmax_cross_entropy + softmax_cross_entropy", "is given twice; add up its weights"),
            ("0*softmax_cross_entropy", "weight of 'softmax_cross_entropy'=0.0; expected a positive number"),
            ("-1*softmax_cross_entropy", "cannot read '-1"),
            ({}, "no term is given"),
            ({"softmax_cross_entropy+sigmoid_cross_entropy": 1.0}, "holds 2 terms; give each its own weight"),
            (("softmax_cross_entropy",), "is neither text, a mapping"),
            ({"softmax_cross_entropy": float("inf")}, "weight of 'softmax_cross_entropy'=inf"),
            ("softmax_cross_entropy(label_smoothing=1.5)", "label_smoothing=1.5; expected a number in [0, 1)"),
            ("softmax_cross_entropy(label_smoothing=nan)", "expected a number"),
            ({"softmax_cross_entropy": "much"}, "weight of 'softmax_cross_entropy'='much'; expected a positive number"),
        ],
    )
    def test_refusals(self, given, message):
        with pytest.raises(errors.ConfigError, match=re.escape(message)):
            TaskLoss.of(given, CLASSIFICATION)


def test_an_unknown_metric_shows_the_nearest():
    with pytest.raises(errors.ConfigError, match=r"unknown metric of objective .* did you mean 'top5_accuracy'"):
        CLASSIFICATION.measured(("accuracy", "top_5_accuracy"))
