"""An objective of your own: a label for every pixel of the handwritten digits, stroke or background.

    python examples/own_objective.py

An `Objective` holds in one place what a task is about: head, targets, loss terms, metrics and answers. Once registered, it
works everywhere; the command line learns of it with `--import`:

    PYTHONPATH=examples k4p1 export --import own_objective --model_dir /tmp/k4p1/own_objective --export_dir /tmp/k4p1/served
"""

import argparse
from typing import ClassVar

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import k4p1
from k4p1.data import Source, Targets
from k4p1.engine.metrics import Metric
from k4p1.patches.task_head import TaskHead
from k4p1.serving.export import export
from k4p1.tasks import objectives

LABELS = ("background", "stroke")


class DigitStrokes(Source):
    """Digits (8, 8, 3) and masks (8, 8, 1): 1 where a pixel is brighter than half."""

    name, labels, fields = "digit strokes", LABELS, ("mask",)

    def __init__(self):
        grey = load_digits().images[..., None]
        self._images = np.repeat(np.round(grey * (255 / 16)).astype(np.uint8), 3, axis=-1)
        self._masks = (grey > 8).astype(np.uint8)

    def sizes(self):
        return {"train": len(self._images)}  # k4p1 holds out test and validation splits

    def examples(self, split):
        return tf.data.Dataset.from_tensor_slices({"image": self._images, "mask": self._masks})


class PixelLabels(Targets):
    """`mask`, (height, width, 1) uint8: a map, so that it is resized and augmented together with the image."""

    fields = maps = ("mask",)

    def read(self, fields):
        return {"mask": fields["mask"]}

    def blank(self, fields, size):
        return {"mask": tf.zeros([*size, 1], tf.uint8)}


class PixelHead(TaskHead):
    """Logits (height, width, 2): a 1x1 convolution of the feature map at a quarter of the image's size, upsampled."""

    endpoints = ("stride_4",)

    def make(self, seed):
        classify = keras.layers.Conv2D(len(LABELS), 1, kernel_initializer=keras.initializers.GlorotUniform(seed=seed))
        return keras.Sequential([classify, keras.layers.UpSampling2D(4, interpolation="bilinear")], name="head")


def pixel_cross_entropy(batch, outputs):
    """Mean over the pixels of each image; (batch,)."""
    truth = tf.cast(batch["mask"][..., 0], tf.int32)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(truth, outputs["logits"]), axis=(1, 2))


class MeanIoU(Metric):
    """Intersection over union of truth and guess, mean over classes; from the confusion matrix of the whole split."""

    def measure(self, batch, outputs):
        truth = tf.one_hot(batch["mask"][..., 0], len(LABELS))
        guess = tf.one_hot(tf.argmax(outputs["logits"], axis=-1), len(LABELS))
        return {"confusion": tf.einsum("b,bhwt,bhwg->tg", batch["weight"], truth, guess)}

    def result(self, measured):
        confusion = measured["confusion"]
        intersection = np.diag(confusion)
        return float(np.mean(intersection / (confusion.sum(axis=0) + confusion.sum(axis=1) - intersection)))


class Segmentation(objectives.Objective):
    """A label for every pixel."""

    name = "segmentation"
    loss_terms: ClassVar = {"pixel_cross_entropy": pixel_cross_entropy}
    default_loss = "pixel_cross_entropy"
    metrics: ClassVar = {"mean_iou": MeanIoU()}
    default_metrics = ("mean_iou",)

    def head(self, labels):
        return PixelHead()

    def targets(self, labels):
        return PixelLabels()

    def answers(self, outputs):
        return {"classes": tf.argmax(outputs["logits"], axis=-1), "probabilities": tf.nn.softmax(outputs["logits"])}


objectives.register(Segmentation())


def main():
    """Trains, evaluates and exports; draws one answer of the SavedModel."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model_dir", default="/tmp/k4p1/own_objective")
    a = parser.parse_args()

    source = DigitStrokes()
    k4p1.finetune(
        backbone=lambda: k4p1.cifar_resnet(depth=8),
        task=k4p1.Task(name="strokes", data=source, objective="segmentation", patch="scale_bias+head", image_size=32),
        steps=a.steps,
        optimizer=k4p1.OptimizerConfig(learning_rate=1e-2),
        model_dir=a.model_dir,
        quiet=True,
    )
    measured = k4p1.evaluate(a.model_dir, data=source)["strokes"]
    print(f"test mean IoU: {measured['mean_iou']:.3f} over {measured['examples']:.0f} images")

    path, _ = export(a.model_dir, f"{a.model_dir}/served")["strokes"]
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    digit = next(iter(source.examples("train").batch(1)))["image"]
    for row in served(images=digit)["classes"][0, 2::4, 2::4].numpy():
        print("".join(".#"[label] for label in row))


if __name__ == "__main__":
    main()
