"""Kinds that change the graph: what they put between the layers of the backbone when a task model is built."""

import abc
from collections.abc import Callable, Mapping

import keras

from k4p1.patches.own_layer import OwnLayer

LayerFor = Callable[[keras.Operation], keras.Operation]
"""The layer that stands for an operation of the backbone in the task model."""


class Rewiring(abc.ABC):
    """How a kind rewires one task model; made by `PatchKind.rewire`, used once.

    Attributes:
      layers: the layers that it adds, by the name that their parameters go by.
    """

    layers: dict[str, OwnLayer]

    @abc.abstractmethod
    def after(self, name: str, operation: keras.Operation, output: keras.KerasTensor) -> keras.KerasTensor:
        """What the layers behind an operation of the backbone read in place of its output, in topological order."""

    def facts(self) -> Mapping[str, int]:
        """What tables and result files say of the rewired network, whole numbers by name."""
        return {}
