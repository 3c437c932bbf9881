"""The series residual adapter (RA, section 3.1.1)."""

import dataclasses
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from k4p1 import errors
from k4p1.backbones.series_adapters import SUFFIX, SharedSeriesAdapter, he_std
from k4p1.patches import patched_batch_normalization, patched_convolution, patched_layer
from k4p1.patches.kinds import residual_adapter
from k4p1.patches.patched_layer import STATISTICS, PrivateVariable

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeriesAdapter(residual_adapter.AdapterKind):
    """A 1x1 convolution behind a convolution, `h = f * x`, `y = h + alpha BN_a(h)`, alpha (D, D); zero at the start.

    BN_a is inside the branch, so that the network starts as it was. It owns no other batch normalisation: RA's model is
    `series_adapter+scale_bias+head`. On a backbone that was trained with series adapters
    (`backbones.with_series_adapters`) it adds none, but owns a copy of those.

    Attributes:
      momentum: of BN_a's moving statistics.
      recalibrate: replace them by population statistics after training.
    """

    name: ClassVar[str] = "series_adapter"
    summary: ClassVar[str] = "1x1 convolutions behind convolutions (RA, section 3.1.1)"
    order: ClassVar[int] = 5

    momentum: float = 0.99
    recalibrate: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._check_momentum(self.momentum)

    def fits(self, site, network):
        if not any(isinstance(one.layer, SharedSeriesAdapter) for one in network):
            return super().fits(site, network)
        if self.block == "all" or not isinstance(site.layer, SharedSeriesAdapter):
            return isinstance(site.layer, SharedSeriesAdapter)
        adapted = site.name.removesuffix(SUFFIX)
        return any(one.name == adapted and one.block_position == 2 for one in network)

    def layer_patch(self, site):
        return SeriesBranch(self.rank, self.std_of(site.layer), self._dropout_at(site), momentum=self.momentum)

    def replaces_layer(self, layer):
        return isinstance(layer, SharedSeriesAdapter)

    def whole_layer(self, layer):
        if self.rank or self.dropout:
            raise errors.PatchError(
                f"series_adapter: '{layer.name}' is an adapter of the backbone, and its private copy is whole and without "
                "dropout; leave rank= and dropout= out"
            )
        own = patched_layer.private_copy(layer)
        own.momentum = self.momentum
        if self.init != residual_adapter.SAME or self.init_std:
            channels = own.alpha.shape[-1]
            std = he_std(channels) if self.init == residual_adapter.HE else self.init_std
            own.alpha.assign(keras.random.normal(own.alpha.shape, stddev=std) if std else ops.zeros(own.alpha.shape))
        return own


@keras.saving.register_keras_serializable("k4p1")
class SeriesBranch(residual_adapter.Adapter):
    """`y = h + alpha BN_a(h)` for a linear output h (..., D), alpha applied as `BN_a(h) @ alpha`.

    With `a = gamma_a / sqrt(variance + epsilon)` and `c = beta_a - mean a` it folds into the convolution: the kernel becomes
    `f (I + diag(a) alpha)`, the bias `b (I + diag(a) alpha) + c alpha`.
    """

    kind = "series_adapter"

    def __init__(self, rank=0, std=0.0, dropout=0.0, joint=False, momentum=0.99, **kwargs):
        super().__init__(rank, std, dropout, joint, **kwargs)
        self.momentum = momentum

    def bind(self, layer):
        channels = patched_convolution.output_channels(layer)
        self.axis = 1 if layer.data_format == "channels_first" else -1
        self.data_format = layer.data_format
        self.bind_matrix(layer, channels, channels)

        def vector(name, start, trainable=True):
            return self.add_weight(
                name=name, shape=(channels,), initializer=start, trainable=trainable, dtype="float32", autocast=False
            )

        self.bn_gamma, self.bn_beta = vector("bn_gamma", "ones"), vector("bn_beta", "zeros")
        self.moving_mean = vector("moving_mean", "zeros", trainable=False)
        self.moving_variance = vector("moving_variance", "ones", trainable=False)

    def output(self, outputs, inputs, training=False):
        x = ops.cast(outputs, keras.backend.result_type(outputs.dtype, "float32"))
        if training:
            normalised, mean, variance = patched_batch_normalization.normalise(
                x, self.bn_gamma, self.bn_beta, self.axis, _EPSILON
            )
            for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
            if self.dropped is not None:
                normalised = self.dropped(normalised, training=True)
        else:
            normalised = ops.batch_normalization(
                x,
                self.moving_mean,
                self.moving_variance,
                axis=self.axis,
                offset=self.bn_beta,
                scale=self.bn_gamma,
                epsilon=_EPSILON,
            )
        alpha = ops.cast(self.matrix(), outputs.dtype)
        kernel = ops.reshape(alpha, (*(1 for _ in outputs.shape[2:]), *alpha.shape))
        normalised = ops.cast(normalised, outputs.dtype)
        return outputs + ops.conv(normalised, kernel, padding="valid", data_format=self.data_format)

    def private_variables(self):
        statistics = {id(self.moving_mean), id(self.moving_variance)}
        return [
            PrivateVariable(p.kind, p.name, p.variable, STATISTICS if id(p.variable) in statistics else p.role)
            for p in super().private_variables()
        ]

    def fold(self, kernel, bias, layer, others):
        alpha, gamma, beta, mean, variance = (
            np.asarray(ops.convert_to_numpy(v), np.float64)
            for v in (self.matrix(), self.bn_gamma, self.bn_beta, self.moving_mean, self.moving_variance)
        )
        scale = gamma / np.sqrt(variance + _EPSILON)
        mixing = np.eye(len(scale)) + scale[:, None] * alpha
        folded_bias = bias @ mixing + (beta - mean * scale) @ alpha
        return (kernel @ mixing).astype(np.float32), folded_bias.astype(np.float32), others

    def multiply_adds(self, layer, positions):
        channels = patched_convolution.output_channels(layer)
        mixing = 2 * self.rank * channels if self.rank else channels**2
        return positions * (mixing + channels)  # BN_a scales

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum}
