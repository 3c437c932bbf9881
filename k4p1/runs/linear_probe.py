"""Whether a plain linear classifier would have done better: the default that loses is told of.

A linear probe is multinomial logistic regression on the features of the frozen backbone as it came. In short runs, and on
images like those that the backbone was trained on, it can be ahead of a patch that has only begun to learn.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from k4p1.backbones.backbone import Backbone
from k4p1.data.pipeline import Pipeline
from k4p1.patches.apply import apply_patches
from k4p1.runs.settings import RunSettings
from k4p1.tasks.objectives import CLASSIFICATION
from k4p1.tasks.prepare import PreparedTask

_IMAGES, _MOST_FEATURES = 2000, 8_000_000
_SHARE, _FEW_IMAGES = 0.1, 500
_MARGIN = 0.01


def compare(backbone: Backbone, prepared: Sequence[PreparedTask], result: Mapping[str, Any], settings: RunSettings) -> None:
    """Prints a line for each task whose validation accuracy is below that of a linear probe by more than 1%.

    Args:
      backbone: frozen during the run.
      prepared: the tasks, trained.
      result: the content of `result.json`.
      settings: `linear_probe` says whether; None: where the probe's images are at most 500, or a tenth of those
        of the run.
    """
    if settings.linear_probe is False:
        return
    for task in prepared:
        reached = result["tasks"][task.name].get("validation_accuracy")
        objective = task.task.objective
        if reached is None or objective not in (CLASSIFICATION, CLASSIFICATION.name) or str(task.patched.spec) == "head":
            continue
        images = min(_IMAGES, task.splits.size("train")) + task.splits.size("validation")
        cheap = images <= max(_FEW_IMAGES, _SHARE * task.steps * task.task.batch_size)
        cheap = cheap and images * backbone.features <= _MOST_FEATURES
        if not (settings.linear_probe or cheap):
            continue
        accuracy = validation_accuracy(backbone, task.pipeline, task.patched.image_size)
        if accuracy > reached + _MARGIN:
            print(
                f"task '{task.name}': a linear classifier on the frozen backbone's features reaches a validation accuracy "
                f"of {accuracy:.3f}, '{task.patched.spec}' {reached:.3f}; train longer, or try patch 'head' or "
                "'scale_bias(statistics=frozen)+head'"
            )


def validation_accuracy(backbone: Backbone, pipeline: Pipeline, image_size: tuple[int, int]) -> float:
    """Validation accuracy of logistic regression on standardised features, trained on up to 2,000 training images."""
    from sklearn import linear_model, preprocessing
    from sklearn import pipeline as steps
    from sklearn.exceptions import ConvergenceWarning

    network = apply_patches(backbone, "head", classes=1, image_size=image_size, name="linear_probe")
    features = keras.Model(network.model.input, network.endpoints["features"])
    forward = tf.function(lambda images: features(images, training=False), reduce_retracing=True)
    found = []
    for split, most in (("train", _IMAGES), ("validation", None)):
        rows, labels = [], []
        batches = pipeline.calibration() if split == "train" else pipeline.sequential(split)
        for batch in batches:
            read = batch["weight"].numpy() > 0
            rows.append(np.asarray(forward(batch["inputs"]), np.float32)[read])
            labels.append(batch["label"].numpy()[read])
            if most is not None and sum(map(len, labels)) >= min(most, pipeline.examples(split)):
                break
        found.append((np.concatenate(rows), np.concatenate(labels)))
    (x, y), (x_held, y_held) = found
    if len(np.unique(y)) < 2:
        return 0.0
    probe = steps.make_pipeline(preprocessing.StandardScaler(), linear_model.LogisticRegression(C=0.1, max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(x, y)
    return float(probe.score(x_held, y_held))
