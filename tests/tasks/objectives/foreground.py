"""An objective of a user's own, outside the package: which pixels of a handwritten digit are ink."""

import dataclasses
from typing import ClassVar

import keras
import numpy as np
import tensorflow as tf

import gin
from k4p1.data import Source, Targets
from k4p1.engine.metrics import Metric
from k4p1.patches.task_head import TaskHead
from k4p1.tasks.objectives import Objective, register

LABELS = ("paper", "ink")


@dataclasses.dataclass(frozen=True)
class PixelHead(TaskHead):
    """Logits (batch, height, width, classes) of a feature map and of the pooled features, at the size of the map."""

    classes: int

    endpoints = ("stride_2", "features")

    def make(self, seed):
        return PixelLayer(self.classes, name="head")


@keras.saving.register_keras_serializable("tests")
class PixelLayer(keras.layers.Layer):
    """A 1x1 convolution of the map, plus a bias per class from the pooled features."""

    def __init__(self, classes, **kwargs):
        super().__init__(**kwargs)
        self.classes = classes
        self.local = keras.layers.Conv2D(4 * classes, 1, name="local")
        self.overall = keras.layers.Dense(classes, name="overall")

    def build(self, input_shape):
        self.local.build(input_shape[0])
        self.overall.build(input_shape[1])

    def call(self, inputs):
        maps, pooled = inputs
        logits = self.local(maps)  # four times the classes: a pixel of the map stands for 2 x 2 of the image
        batch, height, width = keras.ops.shape(logits)[:3]
        logits = keras.ops.reshape(logits, (batch, height, width, 2, 2, self.classes))
        logits = keras.ops.reshape(
            keras.ops.transpose(logits, (0, 1, 3, 2, 4, 5)), (batch, 2 * height, 2 * width, self.classes)
        )
        return logits + keras.ops.reshape(self.overall(pooled), (-1, 1, 1, self.classes))

    def get_config(self):
        return {**super().get_config(), "classes": self.classes}


class Mask(Targets):
    """`mask`, uint8 (height, width, 1): the class of each pixel."""

    fields = ("mask",)
    maps = ("mask",)

    def read(self, fields):
        return {"mask": fields["mask"]}

    def blank(self, fields, size):
        return {"mask": tf.zeros([*size, 1], tf.uint8)}


def pixel_cross_entropy(batch, outputs, *, ink_weight: float = 1.0):
    """Mean over pixels; pixels of ink count `ink_weight` times."""
    labels = tf.cast(batch["mask"][..., 0], tf.int32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs["logits"])
    weights = tf.where(labels == 1, ink_weight, 1.0)
    return tf.reduce_mean(weights * losses, axis=(1, 2))


class MeanIoU(Metric):
    """`mean_c |found_c and true_c| / |found_c or true_c|`, accumulated over the split as a confusion matrix."""

    def measure(self, batch, outputs):
        found = tf.reshape(tf.argmax(outputs["logits"], axis=-1), [-1])
        true = tf.reshape(batch["mask"], [-1])
        weights = tf.repeat(batch["weight"], tf.size(batch["mask"][0]))
        return {"confusion": tf.math.confusion_matrix(true, found, len(LABELS), weights, tf.float32)}

    def result(self, measured):
        confusion = measured["confusion"]
        both = np.diag(confusion)
        return float(np.mean(both / np.maximum(confusion.sum(0) + confusion.sum(1) - both, 1.0)))


class Foreground(Objective):
    """Ink or paper, pixel by pixel."""

    name = "foreground"
    loss_terms: ClassVar = {"pixel_cross_entropy": pixel_cross_entropy}
    default_loss = "pixel_cross_entropy"
    metrics: ClassVar = {"mean_iou": MeanIoU()}
    default_metrics = ("mean_iou",)

    def head(self, labels):
        return PixelHead(len(labels))

    def targets(self, labels):
        return Mask()

    def answers(self, outputs):
        return {"classes": tf.argmax(outputs["logits"], axis=-1), "logits": outputs["logits"]}


register(Foreground())


class DigitsWithMasks(Source):
    """scikit-learn's handwritten digits at twice their size, and which of their pixels are ink."""

    name, labels, fields = "digits with masks", LABELS, ("mask",)

    def __init__(self):
        from sklearn import datasets

        images = np.kron(datasets.load_digits().images[:400], np.ones((1, 2, 2)))[..., None]
        pixels = np.repeat(np.round(images * (255 / 16)), 3, axis=-1).astype(np.uint8)
        masks = (images > 8).astype(np.uint8)
        self._splits = {"train": (pixels[:320], masks[:320]), "test": (pixels[320:], masks[320:])}

    def sizes(self):
        return {split: len(images) for split, (images, _) in self._splits.items()}

    def examples(self, split):
        images, masks = self._splits[split]
        return tf.data.Dataset.from_tensor_slices({"image": images, "mask": masks})


@gin.register(module="foreground")
def digits_with_masks():
    """For gin files: `Task.data = @digits_with_masks()`."""
    return DigitsWithMasks()
