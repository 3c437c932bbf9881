"""Losses, metrics, augmentations, class and sample weights of a Keras user."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import k4p1
from k4p1 import errors
from k4p1.data import augment
from k4p1.patches.patched_model import LOGITS
from k4p1.tasks import objectives, python_objects
from k4p1.tasks.loss import TaskLoss, parse

LABELS = tf.constant([0, 2, 1, 1], tf.int64)
OUTPUTS = {LOGITS: tf.constant(np.random.default_rng(0).normal(size=(4, 3)), tf.float32)}
BATCH = {"label": LABELS, "weight": tf.constant([1.0, 1.0, 0.0, 1.0])}


def cross_entropy(labels, logits):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def of(loss, batch=BATCH, **settings):
    task = k4p1.Task(name="t", data="embedded/digits", loss=loss, **settings)
    objective = objectives.find("classification")
    terms = TaskLoss(task.terms, objective, class_weights=task.class_weights("abc"))(batch, OUTPUTS)
    return {name: float(term.value) for name, term in terms.items()}


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (cross_entropy, "cross_entropy"),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), "sparse_categorical_crossentropy"),
        (keras.losses.CategoricalCrossentropy(from_logits=True, name="ce"), "ce"),
        ({cross_entropy: 1.0}, "cross_entropy"),
    ],
)
def test_a_loss_of_keras_is_ours(loss, name):
    assert of(loss) == {name: pytest.approx(of("softmax_cross_entropy")["softmax_cross_entropy"], rel=1e-5)}


def test_a_function_beside_a_named_term():
    terms = parse({cross_entropy: 0.5, "sigmoid_cross_entropy": 2.0}, objectives.find("classification"), {})
    assert [(term.name, term.weight) for term in terms] == [("cross_entropy", 0.5), ("sigmoid_cross_entropy", 2.0)]


def test_weights_of_classes_and_samples_multiply_the_loss_alone():
    losses = cross_entropy(LABELS, OUTPUTS[LOGITS]).numpy()
    batch = {**BATCH, "sample_weight": tf.constant([1.0, 0.5, 9.0, 2.0])}
    expected = (losses[0] * 1.0 + losses[1] * 0.5 + losses[3] * 2.0 * 3.0) / 3
    assert of("softmax_cross_entropy", batch, class_weight={"b": 3.0}) == {
        "softmax_cross_entropy": pytest.approx(expected, rel=1e-5)
    }
    assert of("softmax_cross_entropy", batch, class_weight={1: 3.0})["softmax_cross_entropy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": keras.losses.SparseCategoricalCrossentropy()}, "give SparseCategoricalCrossentropy(from_logits=True)"),
        ({"loss": 3}, "nor a function of (labels, logits)"),
        ({"metrics": (3,)}, "metric 3; expected a name, a function or a Keras metric"),
        ({"metrics": ("acuracy",)}, "did you mean 'accuracy'?"),
        ({"augment": 3}, "augment=3; expected text"),
        ({"class_weight": {"a": -1.0}}, "class_weight of 'a'=-1.0; expected a number of at least 0"),
    ],
)
def test_the_task_refuses_what_cannot_be(settings, says):
    with pytest.raises(errors.ConfigError) as caught:
        k4p1.Task(name="t", data="embedded/digits", **settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_class_is_named():
    with pytest.raises(errors.ConfigError, match="unknown label in class_weight 'd'"):
        of("softmax_cross_entropy", class_weight={"d": 1.0})


def test_a_loss_that_is_a_mean_is_refused():
    with pytest.raises(errors.ConfigError, match=r"expected one value per example, \(batch,\)"):
        of(lambda labels, logits: tf.reduce_mean(cross_entropy(labels, logits)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.metrics.SparseCategoricalAccuracy(),
        lambda: keras.metrics.AUC(name="auc", multi_label=True),
        lambda: keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
        lambda: keras.metrics.F1Score(average="macro"),
    ],
)
def test_a_metric_of_keras_is_what_keras_computes_at_once(make):
    metric, theirs = python_objects.metric(make()), make()
    parts = [{k: v[i : i + 2] for k, v in BATCH.items()} for i in (0, 2)]
    measured = [metric.measure(part, {LOGITS: OUTPUTS[LOGITS][2 * i : 2 * i + 2]}) for i, part in enumerate(parts)]
    whole = {name: np.concatenate([one[name].numpy() for one in measured]) for name in measured[0]}
    one_hot = type(theirs).__name__ in ("AUC", "F1Score")
    logits = OUTPUTS[LOGITS]
    of_logits = theirs.get_config().get("from_logits")
    theirs.update_state(
        tf.one_hot(LABELS, 3) if one_hot else LABELS, logits if of_logits else tf.nn.softmax(logits), BATCH["weight"]
    )
    assert metric.result(whole) == pytest.approx(float(theirs.result()), rel=1e-5)
    assert metric.larger_is_better == ("crossentropy" not in type(theirs).__name__.lower())


def test_a_function_is_a_mean_over_examples():
    metric = python_objects.metric(lambda labels, logits: tf.cast(labels, tf.float32))
    assert metric.result({k: v.numpy() for k, v in metric.measure(BATCH, OUTPUTS).items()}) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "given",
    [lambda image: 255 - image, lambda image, seed: 255 - image, lambda image: 255.4 - tf.cast(image, tf.float32)],
)
def test_augmentation_by_a_function(given):
    image = tf.constant(np.arange(48).reshape(4, 4, 3), tf.uint8)
    before, (after,) = augment.parse(given)
    assert before == [] and not after.moves
    np.testing.assert_array_equal(after(image, tf.constant([1, 2], tf.int64)), 255 - image)


def test_augmentation_by_a_layer_of_keras():
    _, (after,) = augment.parse(keras.layers.RandomFlip("horizontal"))
    image = tf.constant(np.arange(48).reshape(4, 4, 3), tf.uint8)
    seen = {after(image, tf.constant([1, 2], tf.int64)).numpy().tobytes() for _ in range(20)}
    assert seen == {image.numpy().tobytes(), image[:, ::-1].numpy().tobytes()}
