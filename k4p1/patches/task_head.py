"""The head of a task: from the backbone's endpoints to outputs."""

import abc
import dataclasses
from collections.abc import Callable, Sequence

import keras

from k4p1 import errors
from k4p1.backbones.endpoints import FEATURES

DEFAULT_OBJECTIVE = "classification"


class TaskHead(abc.ABC):
    """Makes the last layer of a task model.

    Attributes:
      endpoints: names of what it reads: `features` (pooled, (batch, n)), `stride_S` (the last feature map at output stride
        S) or a layer's canonical name; see `k4p1.backbones.endpoints`.
    """

    endpoints: tuple[str, ...] = (FEATURES,)

    @abc.abstractmethod
    def make(self, seed: int) -> keras.layers.Layer:
        """A layer of one endpoint, or of a list of several in the order of `endpoints`; equal seeds give equal values."""


@dataclasses.dataclass(frozen=True)
class DenseHead(TaskHead):
    """`logits = features @ kernel + bias`: random kernel (Glorot uniform), zero bias.

    Attributes:
      classes: number of logits.
    """

    classes: int

    def make(self, seed: int) -> keras.layers.Dense:
        initializer = keras.initializers.GlorotUniform(seed=seed)
        return keras.layers.Dense(self.classes, name="head", kernel_initializer=initializer)


_HEADS: dict[str, Callable[[Sequence[str]], TaskHead]] = {DEFAULT_OBJECTIVE: lambda labels: DenseHead(len(labels))}


def register(objective: str, head: Callable[[Sequence[str]], TaskHead]) -> None:
    """Says which head belongs to an objective, as a function of the labels, so that patch files find theirs."""
    _HEADS[objective] = head


def of_objective(objective: str, labels: Sequence[str]) -> TaskHead:
    """The head of an objective for labels.

    Raises:
      ConfigError: unknown objective; the nearest name is shown.
    """
    if objective not in _HEADS:
        raise errors.ConfigError(f"{errors.unknown('objective', objective, _HEADS)} (one of your own: {errors.imported()})")
    return _HEADS[objective](labels)
