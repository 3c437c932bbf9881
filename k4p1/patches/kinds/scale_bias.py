"""The scale-and-bias patch (K4P1, section 2)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import keras
import numpy as np

from k4p1 import errors
from k4p1.patches import (
    kind,
    patched_batch_normalization,
    patched_convolution,
    patched_layer,
    patched_normalization,
)

AFFINE = ("both", "scale", "bias", "frozen")
_FORMER_AFFINE = {"private": "both"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleBias(kind.PatchKind):
    """Private gamma and beta of every normalisation, and private moving mean and variance of batch normalisation.

    A convolution or dense layer can have them too: `y = activation(scale * (f * x + b) + bias)` per output channel, which is
    folded into its kernel and bias at export. In a network without normalisation every such layer has them; with
    `where=every` also those of other networks that no normalisation follows.

    Attributes:
      where: `normalised` (every normalisation; in a network without any, every convolution and dense layer) or `every` (also
        convolutions and dense layers that no normalisation follows: K4P1 patches "every layer"). `batch_normalised`
        is what files mean that name none: batch normalisations, or without any the convolutions.
      statistics: of batch normalisation: `private` (trained with batch statistics, then recalibrated) or `frozen` (the
        backbone's).
      affine: `both`, `scale` or `bias` is private (K4P1, Figure 4; section 6: "biases alone"), or nothing: `frozen`. K4P1,
        Table 6: `head` alone; `scale_bias(affine=frozen)+head`; `scale_bias+head`. `private` is another word for `both`.
      momentum: of private moving statistics.
      recalibrate: replace private moving statistics by population statistics after training.
    """

    name: ClassVar[str] = "scale_bias"
    summary: ClassVar[str] = "scales, biases and statistics of normalisation (K4P1, section 2)"
    order: ClassVar[int] = 6
    former_defaults: ClassVar[Mapping[str, object]] = {"where": "batch_normalised"}

    where: str = "normalised"
    statistics: str = "private"
    affine: str = "both"
    momentum: float = 0.99
    recalibrate: bool = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "affine", _FORMER_AFFINE.get(self.affine, self.affine))
        self._check_choice("where", ("normalised", "every", "batch_normalised"))
        self._check_choice("statistics", ("private", "frozen"))
        self._check_choice("affine", AFFINE)
        self._check_momentum(self.momentum)
        if (self.statistics, self.affine) == ("frozen", "frozen"):
            raise errors.PatchError("scale_bias(statistics=frozen,affine=frozen) owns nothing; leave scale_bias out")

    def fits(self, site, network):
        if isinstance(site.layer, keras.layers.BatchNormalization):
            return True
        if self.affine == "frozen":
            return False
        if self.where == "batch_normalised":
            return isinstance(site.layer, _CONVOLUTIONS) and not _has(network, keras.layers.BatchNormalization)
        if isinstance(site.layer, patched_normalization.NORMALISATIONS):
            return self.affine != "bias" or patched_normalization.has_bias(site.layer)
        if not isinstance(site.layer, tuple(patched_convolution.KERNEL_NAMES)):
            return False
        return not site.normalised if self.where == "every" else not _has(network, _NORMALISATIONS)

    def replaces_layer(self, layer):
        return isinstance(layer, _NORMALISATIONS)

    def whole_layer(self, layer):
        if isinstance(layer, keras.layers.BatchNormalization):
            return patched_batch_normalization.PatchedBatchNormalization(
                layer, self.statistics, self.affine, self.momentum, kind=self.name
            )
        return patched_normalization.PatchedNormalization(layer, self.affine, kind=self.name)

    def layer_patch(self, site):
        return OutputScaleBias(self.affine)

    def why_nothing(self, network):
        if self.affine == "frozen":
            return "it has no batch normalisation whose statistics could be private"
        if self.affine == "bias" and _has(network, _NORMALISATIONS):
            return "its normalisations have no bias"
        return "it has neither normalisation nor convolutions nor dense layers"


_NORMALISATIONS = (keras.layers.BatchNormalization, *patched_normalization.NORMALISATIONS)
_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.SeparableConv2D,
    keras.layers.DepthwiseConv2D,
)


def _has(network, classes) -> bool:
    return any(isinstance(site.layer, classes) for site in network)


@keras.saving.register_keras_serializable("k4p1")
class OutputScaleBias(patched_layer.LayerPatch):
    """`y = scale * h + bias` per channel of a linear output h (..., channels); scale starts at 1, bias at 0.

    Args:
      affine: `both`, or only `scale` or `bias`.
    """

    kind = "scale_bias"

    def __init__(self, affine: str = "both", **kwargs):
        super().__init__(**kwargs)
        self.affine = affine

    def bind(self, layer):
        channels = patched_convolution.output_channels(layer)
        self.channels_first = getattr(layer, "data_format", None) == "channels_first"
        self.gamma = self.beta = None
        if self.affine != "bias":
            self.gamma = self.add_weight(name="gamma", shape=(channels,), initializer="ones")
        if self.affine != "scale":
            self.beta = self.add_weight(name="beta", shape=(channels,), initializer="zeros")

    def output(self, outputs, inputs, training=False):
        trailing = (1,) * (len(outputs.shape) - 2) if self.channels_first else ()
        if self.gamma is not None:
            outputs = outputs * keras.ops.reshape(self.gamma, (-1, *trailing))
        return outputs if self.beta is None else outputs + keras.ops.reshape(self.beta, (-1, *trailing))

    def multiply_adds(self, layer, positions):
        return positions * patched_convolution.output_channels(layer)

    def fold(self, kernel, bias, layer, others):
        channels = patched_convolution.output_channels(layer)
        gamma = np.ones(channels, np.float32) if self.gamma is None else keras.ops.convert_to_numpy(self.gamma)
        beta = np.zeros(channels, np.float32) if self.beta is None else keras.ops.convert_to_numpy(self.beta)
        if isinstance(layer, keras.layers.SeparableConv2D):
            others = {**others, "pointwise_kernel": np.asarray(layer.pointwise_kernel) * gamma}
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            kernel = kernel * gamma.reshape(kernel.shape[-2:])
        else:
            kernel = kernel * gamma
        return kernel, bias * gamma + beta, others

    def get_config(self):
        return {**super().get_config(), "affine": self.affine}
