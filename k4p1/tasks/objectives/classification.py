"""Classification: one label per image."""

from typing import ClassVar

import numpy as np
import tensorflow as tf

from k4p1.data.targets import ClassLabel
from k4p1.engine.metrics import Batch, Outputs, PerExample
from k4p1.patches.patched_model import LOGITS
from k4p1.patches.task_head import DEFAULT_OBJECTIVE, DenseHead
from k4p1.tasks.objectives import objective


def softmax_cross_entropy(batch: Batch, outputs: Outputs, *, label_smoothing: float = 0.0) -> tf.Tensor:
    """`-sum_c q_c log softmax(logits)_c` with `q = (1 - s) onehot(label) + s / classes`; (batch,)."""
    labels, logits = batch["label"], outputs[LOGITS]
    if not label_smoothing:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    classes = logits.shape[-1]
    target = tf.one_hot(labels, classes, 1.0 - label_smoothing + label_smoothing / classes, label_smoothing / classes)
    return tf.nn.softmax_cross_entropy_with_logits(target, logits)


def sigmoid_cross_entropy(batch: Batch, outputs: Outputs, *, label_smoothing: float = 0.0) -> tf.Tensor:
    """Mean over classes of the binary cross-entropy of one-against-all classifiers; (batch,)."""
    logits = outputs[LOGITS]
    target = tf.one_hot(batch["label"], logits.shape[-1]) * (1.0 - label_smoothing) + 0.5 * label_smoothing
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(target, logits), axis=-1)


def accuracy(batch: Batch, outputs: Outputs) -> tf.Tensor:
    """1 where the largest logit is that of the label; (batch,)."""
    return tf.cast(tf.equal(tf.argmax(outputs[LOGITS], axis=-1), batch["label"]), tf.float32)


def top5_accuracy(batch: Batch, outputs: Outputs) -> tf.Tensor:
    """1 where the label is among the five largest logits; (batch,)."""
    logits = outputs[LOGITS]
    return tf.cast(tf.math.in_top_k(batch["label"], logits, min(5, logits.shape[-1])), tf.float32)


class Classification(objective.Objective):
    """One label per image: a dense head on pooled features, cross-entropy, accuracy; probabilities and logits as answers."""

    name = DEFAULT_OBJECTIVE
    loss_terms: ClassVar = {"softmax_cross_entropy": softmax_cross_entropy, "sigmoid_cross_entropy": sigmoid_cross_entropy}
    default_loss = "softmax_cross_entropy"
    metrics: ClassVar = {"accuracy": PerExample(accuracy), "top5_accuracy": PerExample(top5_accuracy)}
    default_metrics = ("accuracy",)

    def head(self, labels):
        return DenseHead(len(labels))

    def targets(self, labels):
        return ClassLabel(len(labels))

    def answers(self, outputs):
        return {"probabilities": tf.nn.softmax(outputs[LOGITS]), LOGITS: outputs[LOGITS]}

    def summary(self, answers, labels, top):
        probabilities = np.asarray(answers["probabilities"])
        return [(labels[i], float(probabilities[i])) for i in np.argsort(-probabilities)[:top]]


CLASSIFICATION = objective.register(Classification())
