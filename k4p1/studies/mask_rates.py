"""Masks over a network whose batch normalisation is frozen, by learning rate: the measurements of docs/methods.md."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import keras
import numpy as np

from k4p1.backbones.backbone import Backbone
from k4p1.data import Pipeline, Source, Splits, open_source
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.methods.finetune import finetune
from k4p1.patches.kinds.mask import sparsity
from k4p1.studies.sparsity import total
from k4p1.tasks.task import Task

_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class MaskRate:
    """What scores that learn at a rate do to the network.

    Attributes:
      rate: learning rate of the scores.
      sparsity: share of the weights masked out, in [0, 1].
      test_accuracy: in [0, 1].
      spread: standard deviation of the features over 256 test images, mean over features.
      backbone_spread: the same without mask.
    """

    rate: float
    sparsity: float
    test_accuracy: float
    spread: float
    backbone_spread: float


def mask_rates(
    *,
    backbone: Callable[[], Backbone],
    data: str | Source,
    rates: Sequence[float] = (1e-4, 3e-4),
    steps: int = 150,
    quiet: bool = False,
) -> list[MaskRate]:
    """Trains `mask+head` with several learning rates of the scores, and measures what is left of the features.

    Batch normalisation keeps the statistics of the unmasked network (PB, section 5.3, compares it with its own). Images
    of 32 pixels, batches of 32, random shifts of 4 pixels, Adam with cosine decay, the head at 1e-3, nothing held out.

    Args:
      backbone: loads the pretrained network; called for every rate.
      data: of the task; see `k4p1.Task`.
      rates: learning rates of the scores.
      steps: per rate.
      quiet: show no progress.

    Returns:
      One entry per rate.

    Raises:
      ConfigError: a number out of range.
      DataError: data that cannot be read.
    """
    optimizers = [OptimizerConfig(learning_rate=1e-3, rules={"mask": {"learning_rate": rate}}) for rate in rates]
    how = {"image_size": 32, "batch_size": 32, "augment": "shift(pixels=4)", "validation_fraction": 0.0}
    source = open_source(data)
    task = Task(name="task", data=data, patch="mask+head", steps=steps, **how)
    images = _test_images(source, task.image_size)
    found = []
    for rate, optimizer in zip(rates, optimizers, strict=True):
        result = finetune(backbone=backbone, task=task, optimizer=optimizer, quiet=True)
        patched = result.models["task"]
        network = next(layer for layer in patched.model.layers if isinstance(layer, keras.Model))
        scaled = patched.model.get_layer("input_scaling")(images)
        spreads = (_spread(network, scaled), _spread(result.backbone.model, scaled))
        accuracy = result.summary["tasks"]["task"]["test_accuracy"]
        found.append(MaskRate(rate, total(sparsity(patched)), accuracy, *spreads))
        if not quiet:
            print(f"rate {rate:g} ({len(found)} of {len(rates)}): test {100 * accuracy:.1f}%", flush=True)
    return found


def markdown(found: Iterable[MaskRate]) -> Iterator[str]:
    """The table of docs/methods.md, line by line."""
    spread = "spread of the features over images, against the backbone's"
    yield f"| rate of the scores | weights masked out | test accuracy | {spread} |"
    yield "|---|---|---|---|"
    for entry in found:
        spreads = f"{entry.spread:.4f} against {entry.backbone_spread:.4f}"
        yield f"| {entry.rate:g} | {entry.sparsity:.1%} | {100 * entry.test_accuracy:.1f} | {spreads} |"


def _test_images(source: Source, size: int) -> np.ndarray:
    """The first test images (at most 256, size, size, 3)."""
    pipeline = Pipeline(source, Splits(source), (size, size), _IMAGES, len(source.labels))
    return next(iter(pipeline.sequential("test")))["inputs"]


def _spread(network: keras.Model, images: np.ndarray) -> float:
    features = keras.ops.convert_to_numpy(network(images, training=False))
    return float(np.std(features, axis=0).mean())
