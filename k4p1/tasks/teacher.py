"""A finished task as teacher: learning without forgetting (Li and Hoiem, 2016; compared with in PB and NT)."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from k4p1 import errors
from k4p1.patches.patched_model import PatchedModel

Batch = Mapping[str, tf.Tensor]


class Teacher:
    """Labels batches by what a finished task model says of their images.

    Args:
      patched: the finished task; its weights stay as they are.
      labels: its class names.
      temperature: T, by which its logits are divided.
    """

    def __init__(self, patched: PatchedModel, labels: tuple[str, ...], temperature: float):
        self._model, self.labels, self.image_size = patched.model, labels, patched.image_size
        self._temperature = temperature

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the teacher's class as `label`, and its logits and temperature."""
        logits = tf.stop_gradient(tf.cast(self._model(batch["inputs"], training=False), tf.float32))
        taught = {"label": tf.argmax(logits, axis=-1), "teacher_logits": logits, "temperature": self._temperature}
        return {**batch, **taught}

    def of(self, function: Callable) -> Callable:
        """A loss or metrics of (batch, logits) on the teacher's labels in place of the data's."""
        return lambda batch, logits: function(self(batch), logits)

    def check(self, task: str, image_size: tuple[int, int]) -> None:
        """Raises ConfigError unless the teacher takes images of this size."""
        if image_size != self.image_size:
            raise errors.ConfigError(
                f"task '{task}' has images of {image_size[0]}x{image_size[1]} pixels, its teacher of "
                f"{self.image_size[0]}x{self.image_size[1]}; give both the same image_size"
            )
