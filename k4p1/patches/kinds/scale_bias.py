"""The scale-and-bias patch (K4P1, section 2)."""

import dataclasses
from typing import ClassVar

import keras
import numpy as np

from k4p1 import errors
from k4p1.patches import kind, patched_batch_normalization, patched_convolution, patched_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleBias(kind.PatchKind):
    """Private gamma, beta, moving mean and moving variance of every batch normalisation.

    In a network without batch normalisation, every convolution gets `y = activation(scale * (f * x + b) + bias)` per
    output channel instead; that is folded into the convolution at export.

    Attributes:
      statistics: `private` (trained with batch statistics, then recalibrated) or `frozen` (the backbone's).
      affine: `private` or `frozen`. K4P1, Table 6: `head` alone; `scale_bias(affine=frozen)+head`; `scale_bias+head`.
      momentum: of private moving statistics.
      recalibrate: replace private moving statistics by population statistics after training.
    """

    name: ClassVar[str] = "scale_bias"
    summary: ClassVar[str] = "scales, biases and statistics of batch normalisation (K4P1, section 2)"
    order: ClassVar[int] = 6

    statistics: str = "private"
    affine: str = "private"
    momentum: float = 0.99
    recalibrate: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("statistics", ("private", "frozen"))
        self._check_choice("affine", ("private", "frozen"))
        self._check_momentum(self.momentum)
        if (self.statistics, self.affine) == ("frozen", "frozen"):
            raise errors.PatchError("scale_bias(statistics=frozen,affine=frozen) owns nothing; leave scale_bias out")

    def fits(self, site, network):
        if has_batch_normalisation(network):
            return isinstance(site.layer, keras.layers.BatchNormalization)
        is_convolution = isinstance(site.layer, (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.SeparableConv2D))
        return self.affine == "private" and (is_convolution or isinstance(site.layer, keras.layers.DepthwiseConv2D))

    def replaces_layer(self, layer):
        return isinstance(layer, keras.layers.BatchNormalization)

    def whole_layer(self, layer):
        return patched_batch_normalization.PatchedBatchNormalization(
            layer, self.statistics, self.affine, self.momentum, kind=self.name
        )

    def layer_patch(self, site):
        return OutputScaleBias()

    def why_nothing(self, network):
        if self.affine == "frozen":
            return "it has no batch normalisation whose statistics could be private"
        return "it has neither batch normalisation nor convolutions"


def has_batch_normalisation(network) -> bool:
    """Whether any layer of the network is a batch normalisation."""
    return any(isinstance(site.layer, keras.layers.BatchNormalization) for site in network)


@keras.saving.register_keras_serializable("k4p1")
class OutputScaleBias(patched_layer.LayerPatch):
    """`y = scale * h + bias` per channel of a linear output h (..., channels); scale starts at 1, bias at 0."""

    kind = "scale_bias"

    def bind(self, layer):
        channels = patched_convolution.output_channels(layer)
        self.channels_first = getattr(layer, "data_format", None) == "channels_first"
        self.gamma = self.add_weight(name="gamma", shape=(channels,), initializer="ones")
        self.beta = self.add_weight(name="beta", shape=(channels,), initializer="zeros")

    def output(self, outputs, inputs, training=False):
        trailing = (1,) * (len(outputs.shape) - 2) if self.channels_first else ()
        gamma, beta = (keras.ops.reshape(v, (-1, *trailing)) for v in (self.gamma, self.beta))
        return gamma * outputs + beta

    def multiply_adds(self, layer, positions):
        return positions * patched_convolution.output_channels(layer)

    def fold(self, kernel, bias, layer, others):
        gamma, beta = keras.ops.convert_to_numpy(self.gamma), keras.ops.convert_to_numpy(self.beta)
        if isinstance(layer, keras.layers.SeparableConv2D):
            others = {**others, "pointwise_kernel": np.asarray(layer.pointwise_kernel) * gamma}
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            kernel = kernel * gamma.reshape(kernel.shape[-2:])
        else:
            kernel = kernel * gamma
        return kernel, bias * gamma + beta, others
