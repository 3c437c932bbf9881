"""Losses and metrics that are functions or objects of Keras, in terms of a task's batches and outputs.

All are given (labels, logits) of a batch. A loss of Keras is called with one-hot labels where its class asks for them
(`CategoricalCrossentropy`, `BinaryCrossentropy`, ...); a metric of Keras, unless it is a `Sparse...` one, too, and with
probabilities unless it says `from_logits`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.metrics import Batch, Metric, Outputs, PerExample
from k4p1.patches.patched_model import LOGITS

_ONE_HOT = ("Categorical", "Binary")
_ERRORS = ("loss", "error", "crossentropy", "divergence")


def loss_function(loss: Callable) -> Callable[[Batch, Outputs], tf.Tensor]:
    """A loss term of (batch, outputs): (batch,).

    Args:
      loss: of (labels, logits), one value per example; or a `keras.losses.Loss`, whose reduction does not count.

    Raises:
      ConfigError: a loss of Keras that expects probabilities.
    """
    name, function = name_of(loss), loss
    if isinstance(loss, type):
        raise errors.ConfigError(f"{name} is a class; give one of it: {loss.__name__}(...)")
    of_keras = str(getattr(loss, "__module__", "")).startswith("keras.") and inspect.isfunction(loss)
    if of_keras and "from_logits" in inspect.signature(loss).parameters:
        function = functools.partial(loss, from_logits=True)  # a function has no place to say so
    if isinstance(loss, keras.losses.Loss):
        if loss.get_config().get("from_logits") is False:
            raise errors.ConfigError(
                f"loss {name}: task models put out logits; give {type(loss).__name__}(from_logits=True)"
            )
        function = loss.call
    kind = type(loss).__name__ if isinstance(loss, keras.losses.Loss) else name.title() if of_keras else ""
    one_hot = kind.startswith(_ONE_HOT)

    def term(batch: Batch, outputs: Outputs) -> tf.Tensor:
        labels, logits = _labels_and_logits(name, batch, outputs)
        values = function(tf.one_hot(labels, logits.shape[-1]) if one_hot else labels, logits)
        values = tf.cast(tf.convert_to_tensor(values), tf.float32)
        if values.shape.rank != 1:
            raise errors.ConfigError(
                f"loss {name} gave a tensor of shape {values.shape}; expected one value per example, (batch,): leave out "
                "the mean over the batch"
            )
        return values

    return term


def metric(given: Callable) -> Metric:
    """A metric of a split.

    Args:
      given: a function of (labels, logits), one value per example, of which more is better; or a `keras.metrics.Metric`.
    """
    if isinstance(given, type):
        raise errors.ConfigError(f"metric {given.__name__} is a class; give one of it: {given.__name__}(...)")
    return _OfKeras(given) if isinstance(given, keras.metrics.Metric) else PerExample(loss_function(given))


def name_of(given: Any) -> str:
    """The name by which it is logged."""
    name = getattr(given, "name", None) or getattr(given, "__name__", None) or type(given).__name__
    return str(name).strip("<>")


def check(what: str, function: Callable[[Batch, Outputs], Any], classes: int) -> None:
    """Calls a loss term or the measuring of a metric once, on two examples, so that mistakes are told before training.

    Raises:
      ConfigError: it fails, or gives something of another shape.
    """
    batch = {"label": tf.zeros([2], tf.int64), "weight": tf.ones([2])}
    try:
        function(batch, {LOGITS: tf.zeros([2, classes])})
    except errors.K4p1Error:
        raise
    except Exception as e:  # whatever a user's function raises
        raise errors.ConfigError(f"{what} fails on (labels, logits): {errors.reason(e)}") from e


def to_the_end(metric: Metric) -> Callable[[Batch, Outputs], float]:
    """The metric of one batch, for `check`."""
    return lambda batch, outputs: metric.result({n: v.numpy() for n, v in metric.measure(batch, outputs).items()})


def _labels_and_logits(name: str, batch: Batch, outputs: Outputs) -> tuple[tf.Tensor, tf.Tensor]:
    if "label" not in batch or LOGITS not in outputs:
        raise errors.ConfigError(f"{name} is a function of labels and logits, and the task's objective does not have both")
    return batch["label"], outputs[LOGITS]


class _OfKeras(Metric):
    """A metric of Keras, computed from all labels and outputs of a split at once."""

    gathered = True

    def __init__(self, given: keras.metrics.Metric):
        self._metric, self._name = given, name_of(given)
        config = given.get_config()
        self._of_logits = bool(config.get("from_logits"))
        kind = type(given)
        self._one_hot = kind.__module__.startswith("keras.") and not kind.__name__.startswith("Sparse")
        direction = getattr(given, "_direction", None)
        told = {"up": True, "down": False}.get(direction)
        self.larger_is_better = not any(word in self._name.lower() for word in _ERRORS) if told is None else told

    def measure(self, batch, outputs):
        labels, logits = _labels_and_logits(self._name, batch, outputs)
        return {"labels": labels, "logits": logits, "weights": batch["weight"]}

    def result(self, measured):
        logits = tf.constant(measured["logits"])
        labels = tf.constant(measured["labels"])
        self._metric.reset_state()
        self._metric.update_state(
            tf.one_hot(labels, logits.shape[-1]) if self._one_hot else labels,
            logits if self._of_logits else tf.nn.softmax(logits),
            sample_weight=tf.constant(measured["weights"]),
        )
        found = np.asarray(keras.ops.convert_to_numpy(self._metric.result()))
        if found.size != 1:
            raise errors.ConfigError(f"metric {self._name} gives {found.size} values; expected one number")
        return float(found.reshape(()))
