"""Losses and metrics of classification, one value an example."""

from collections.abc import Mapping

import tensorflow as tf

from k4p1 import errors

Batch = Mapping[str, tf.Tensor]
DISTILLATION = "distillation"


def softmax_cross_entropy(batch: Batch, logits: tf.Tensor, label_smoothing: float = 0.0) -> tf.Tensor:
    """`-sum_c q_c log softmax(logits)_c` with `q = (1 - s) onehot(label) + s / classes`; (batch,)."""
    labels = batch["label"]
    if not label_smoothing:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    classes = logits.shape[-1]
    target = tf.one_hot(labels, classes, 1.0 - label_smoothing + label_smoothing / classes, label_smoothing / classes)
    return tf.nn.softmax_cross_entropy_with_logits(target, logits)


def sigmoid_cross_entropy(batch: Batch, logits: tf.Tensor, label_smoothing: float = 0.0) -> tf.Tensor:
    """Mean over classes of the binary cross-entropy of one-against-all classifiers; (batch,)."""
    target = tf.one_hot(batch["label"], logits.shape[-1]) * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(target, logits), axis=-1)


def distillation(batch: Batch, logits: tf.Tensor, label_smoothing: float = 0.0) -> tf.Tensor:
    """`-T^2 sum_c p_c log softmax(logits / T)_c` with `p = softmax(teacher_logits / T)`; (batch,).

    Hinton et al. 2015, section 2; the factor keeps gradients of the size that they have at T = 1.
    """
    temperature = batch["temperature"]
    target = tf.nn.softmax(batch["teacher_logits"] / temperature)
    return temperature**2 * tf.nn.softmax_cross_entropy_with_logits(target, logits / temperature)


def accuracy(batch: Batch, logits: tf.Tensor) -> tf.Tensor:
    """1 where the largest logit is that of the label; (batch,)."""
    return tf.cast(tf.equal(tf.argmax(logits, axis=-1), batch["label"]), tf.float32)


def top5_accuracy(batch: Batch, logits: tf.Tensor) -> tf.Tensor:
    """1 where the label is among the five largest logits; (batch,)."""
    return tf.cast(tf.math.in_top_k(batch["label"], logits, min(5, logits.shape[-1])), tf.float32)


LOSSES = {"softmax_cross_entropy": softmax_cross_entropy, "sigmoid_cross_entropy": sigmoid_cross_entropy}
LOSSES[DISTILLATION] = distillation
METRICS = {"accuracy": accuracy, "top5_accuracy": top5_accuracy}


class MeanLoss:
    """The mean of a loss over a batch, each example by its weight: `sum w_i l_i / max(sum w_i, 1)`.

    Raises:
      ConfigError: unknown loss, or a label smoothing outside [0, 1).
    """

    def __init__(self, name: str, label_smoothing: float = 0.0):
        if name not in LOSSES:
            raise errors.ConfigError(errors.unknown("loss", name, LOSSES))
        if not 0 <= label_smoothing < 1:
            raise errors.ConfigError(f"label_smoothing={label_smoothing}: wanted a number in [0, 1)")
        self._loss, self._label_smoothing = LOSSES[name], label_smoothing

    def __call__(self, batch: Batch, logits: tf.Tensor) -> tf.Tensor:
        losses = self._loss(batch, logits, self._label_smoothing)
        weights = batch["weight"]
        return tf.reduce_sum(weights * losses) / tf.maximum(tf.reduce_sum(weights), 1.0)


class Metrics:
    """Named metrics and the loss, one value an example.

    Raises:
      ConfigError: an unknown metric.
    """

    def __init__(self, names: tuple[str, ...], loss: str):
        for name in names:
            if name not in METRICS:
                raise errors.ConfigError(errors.unknown("metric", name, METRICS))
        self._functions = {**{name: METRICS[name] for name in names}, "loss": LOSSES[loss]}

    def __call__(self, batch: Batch, logits: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: function(batch, logits) for name, function in self._functions.items()}
