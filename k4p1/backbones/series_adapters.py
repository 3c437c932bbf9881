"""Series residual adapters as layers of a backbone, trained with it (RA, section 4.1).

RA finds that series adapters, unlike parallel ones, must be in the network when it is pretrained: added afterwards they cost
1.73 points. `with_series_adapters` puts them there. `train` then learns them like every shared weight, and a task's
`series_adapter` patch on such a backbone owns a copy of them, kept or begun anew; a patch that does not name them leaves
them shared and frozen.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers, ops

from k4p1 import errors
from k4p1.backbones import build, canonical
from k4p1.backbones.backbone import Backbone

SUFFIX = "_adapter"
_EPSILON = 1e-5


@keras.saving.register_keras_serializable("k4p1")
class SharedSeriesAdapter(layers.Layer):
    """`y = h + alpha BN_a(h)` of the linear output h (..., D) of a convolution, alpha (D, D) applied as `BN_a(h) @ alpha`.

    While it is not trainable its normalisation uses the moving statistics, as Keras' own does.

    Args:
      std: standard deviation of alpha at the start; 0 for zeros.
      momentum: of the moving statistics.
    """

    def __init__(self, std: float = 0.0, momentum: float = 0.9, **kwargs):
        super().__init__(**kwargs)
        self.std, self.momentum = std, momentum

    def build(self, input_shape):
        channels = input_shape[-1]
        start = keras.initializers.RandomNormal(stddev=self.std) if self.std else "zeros"
        self.alpha = self.add_weight(name="alpha", shape=(channels, channels), initializer=start)

        def vector(name, start, trainable):
            kept = {"dtype": "float32", "autocast": False}
            return self.add_weight(name=name, shape=(channels,), initializer=start, trainable=trainable, **kept)

        self.bn_gamma, self.bn_beta = vector("bn_gamma", "ones", True), vector("bn_beta", "zeros", True)
        self.moving_mean = vector("moving_mean", "zeros", False)
        self.moving_variance = vector("moving_variance", "ones", False)

    def call(self, inputs, training=None):
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        mean, variance = self.moving_mean, self.moving_variance
        if training and self.trainable:
            axes = tuple(range(len(x.shape) - 1))
            mean, variance = ops.mean(x, axes), ops.var(x, axes)
            for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving * self.momentum + ops.cast(batch, moving.dtype) * (1.0 - self.momentum))
        normalised = ops.batch_normalization(
            x, mean, variance, axis=-1, offset=self.bn_beta, scale=self.bn_gamma, epsilon=_EPSILON
        )
        return inputs + ops.matmul(ops.cast(normalised, inputs.dtype), ops.cast(self.alpha, inputs.dtype))

    def compute_output_shape(self, input_shape):
        return input_shape

    def multiply_adds(self, positions: int) -> int:
        """Of one image: alpha, and the scale of BN_a."""
        channels = self.alpha.shape[0]
        return positions * (channels**2 + channels)

    def get_config(self):
        return {**super().get_config(), "std": self.std, "momentum": self.momentum}


def he_std(channels: int) -> float:
    """`sqrt(2 / C)`: the standard deviation with which RA's authors start adapters of C output channels."""
    return (2.0 / channels) ** 0.5


def with_series_adapters(backbone: Backbone | Callable[[], Backbone], init: str = "he", momentum: float = 0.9) -> Backbone:
    """The same network with a series adapter behind each convolution, before its activation; its weights are copied.

    Args:
      backbone: flat, channels last: no convolution of it is in an inner model. Or a function that makes it.
      init: `he`: alpha is random with standard deviation sqrt(2 / D), as RA's authors begin; `zero`: the network
        computes what it did.
      momentum: of the adapters' moving statistics.

    Raises:
      ConfigError: another `init`, or a network without convolutions of that kind.
    """
    if init not in ("he", "zero"):
        raise errors.ConfigError(errors.unknown("init of series adapters", init, ("he", "zero")))
    if not 0 <= momentum < 1:
        raise errors.ConfigError(f"with_series_adapters(momentum={momentum}): expected a number in [0, 1)")
    backbone = backbone() if not isinstance(backbone, Backbone) else backbone
    originals = {layer.name: layer for layer in canonical.operations(backbone.model)}
    adapters: dict[str, tuple[layers.Layer, layers.Layer]] = {}
    for name, layer in canonical.leaf_layers(backbone.model):
        if isinstance(layer, SharedSeriesAdapter):
            raise errors.ConfigError(f"backbone '{backbone.name}' has series adapters already, such as '{name}'")
        if not _is_adaptable(layer):
            continue
        if originals.get(name) is not layer:
            raise errors.ConfigError(
                f"backbone '{backbone.name}': convolution '{name}' is in an inner model; series adapters need a flat network"
            )
        adapter = SharedSeriesAdapter(he_std(layer.filters) if init == "he" else 0.0, momentum, name=f"{name}{SUFFIX}")
        activation = layers.Activation(layer.activation, name=f"{name}_activation")
        adapters[name] = (adapter, activation)
    if not adapters:
        raise errors.ConfigError(f"backbone '{backbone.name}' has no convolutions that series adapters could follow")

    def cloned(layer: layers.Layer) -> layers.Layer:
        linear = {"activation": "linear"} if layer.name in adapters else {}
        return type(layer).from_config({**layer.get_config(), **linear})

    def called(layer: layers.Layer, *args: Any, **kwargs: Any) -> Any:
        outputs = layer(*args, **kwargs)
        if layer.name not in adapters:
            return outputs
        adapter, activation = adapters[layer.name]
        outputs = adapter(outputs)
        is_linear = originals[layer.name].activation is keras.activations.linear
        return outputs if is_linear else activation(outputs)

    model = keras.models.clone_model(backbone.model, clone_function=cloned, call_function=called)
    adapted = build.from_model(model, f"{backbone.name}{SUFFIX}s", backbone.scaling)
    adapted.minimum_size = backbone.minimum_size
    adapted.assign({**adapted.tensors(), **backbone.tensors()})
    return adapted


def _is_adaptable(layer: layers.Layer) -> bool:
    is_convolution = type(layer) in (layers.Conv1D, layers.Conv2D)
    return is_convolution and layer.groups == 1 and layer.data_format == "channels_last"
