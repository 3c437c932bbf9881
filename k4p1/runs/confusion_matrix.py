"""Which classes a task takes for which others."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.metrics import Metric
from k4p1.files import atomic
from k4p1.patches.patched_model import LOGITS

_NUMBERS_UP_TO, _NAMES_UP_TO = 20, 60


class Confusion(Metric):
    """Counts (labels, answers): entry (i, j) is the number of images of class i whose largest logit is that of class j.

    Args:
      classes: how many.
    """

    def __init__(self, classes: int):
        self._classes = classes

    def measure(self, batch, outputs):
        if "label" not in batch or LOGITS not in outputs:
            raise errors.ConfigError("confusion is for tasks that classify: this one has no label and logits")
        answers = tf.argmax(outputs[LOGITS], axis=-1)
        counts = tf.math.confusion_matrix(batch["label"], answers, self._classes, batch["weight"], tf.float32)
        return {"counts": counts}

    def result(self, measured):
        return np.round(measured["counts"]).astype(np.int64)


def worst(counts: np.ndarray, labels: Sequence[str], most: int = 10) -> Iterator[tuple[str, str, int, float]]:
    """(label, answer, images, share of the label's images) of the most frequent mistakes, the largest share first."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = [(i, j) for i, j in np.argwhere(counts) if i != j]
    for i, j in sorted(wrong, key=lambda place: (-shares[place], place))[:most]:
        yield labels[i], labels[j], int(counts[i, j]), float(shares[i, j])


def draw(counts: np.ndarray, labels: Sequence[str], title: str, path: pathlib.Path) -> None:
    """Writes the picture: rows are labels, columns answers, colours shares of a row.

    Raises:
      StorageError: it cannot be written.
    """
    from matplotlib.figure import Figure

    side = min(4 + 0.28 * len(labels), 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, ax=axes, label="share of the label's images", shrink=0.8)
    axes.set(title=title, xlabel="answer", ylabel="label")
    if len(labels) <= _NAMES_UP_TO:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= _NUMBERS_UP_TO:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(j, i, count, ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    with atomic.written_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
