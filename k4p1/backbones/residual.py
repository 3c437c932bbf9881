"""Residual networks for small images: those of RA, of PB's Decathlon, and the CIFAR nets of He et al."""

import keras
from keras import layers, ops

from k4p1 import errors

_BN_EPSILON = 1e-5


@keras.saving.register_keras_serializable("k4p1")
class ChannelPadding(layers.Layer):
    """Zeros before and after the channels of (batch, height, width, C): `C + before + after` channels.

    The shortcut without parameters where a residual stage gets wider (He et al. 2016, section 3.3, option A).
    """

    def __init__(self, before: int, after: int, **kwargs):
        super().__init__(**kwargs)
        self.padding = (before, after)

    def call(self, inputs):
        return ops.pad(inputs, [(0, 0), (0, 0), (0, 0), self.padding])

    def plain(self, inputs):
        """The same as an operation of Keras, so that a folded model can be read without k4p1."""
        return ops.pad(inputs, [(0, 0), (0, 0), (0, 0), self.padding])

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] + sum(self.padding))

    def get_config(self):
        return {**super().get_config(), "before": self.padding[0], "after": self.padding[1], "padding": self.padding}

    @classmethod
    def from_config(cls, config):
        return cls(**{key: value for key, value in config.items() if key != "padding"})


def resnet26(width: float = 1.0, dropout: float = 0.0) -> keras.Model:
    """RA's ResNet-26 (section 3.2): three stages of 4 blocks of two 3x3 convolutions, 64, 128, 256 channels times `width`.

    The resolution is halved from stage to stage; shortcuts are average pooled and filled up with zero channels.

    Args:
      width: multiplies the channels (RA, section 4.3: 0.5 to 2.5).
      dropout: rate before the second convolution of each block, as in wide residual nets.
    """
    first, *_ = stages = [_channels("resnet26", width, channels) for channels in (64, 128, 256)]
    image = keras.Input((None, None, 3), name="image")
    x = _convolution(image, max(1, first // 2), "stem", padded=False)
    x = _bn_relu(x, "stem")
    for stage, channels in enumerate(stages, 1):
        for block in range(1, 5):
            halved = stage > 1 and block == 1
            shortcut = layers.AveragePooling2D(2, padding="same", name=f"stage{stage}_block{block}_pool")(x) if halved else x
            x = _basic_block(x, shortcut, channels, f"stage{stage}_block{block}", 2 if halved else 1, dropout, padded=False)
    return keras.Model(image, layers.GlobalAveragePooling2D(name="features")(x), name="resnet26")


def cifar_resnet(depth: int = 56) -> keras.Model:
    """The CIFAR nets of He et al. 2016 (section 4.2): three stages of (depth - 2) / 6 blocks, 16, 32, 64 channels.

    Shortcuts are subsampled and filled up with zero channels on both sides.

    Raises:
      ConfigError: a depth that is not 6 n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise errors.ConfigError(f"cifar_resnet(depth={depth}): expected 6 n + 2, such as 20, 32, 44, 56, 110")
    image = keras.Input((None, None, 3), name="image")
    x = _bn_relu(_convolution(image, 16, "stem"), "stem")
    for stage, channels in enumerate((16, 32, 64), 1):
        for block in range(1, (depth - 2) // 6 + 1):
            halved = stage > 1 and block == 1
            name = f"stage{stage}_block{block}"
            shortcut = layers.AveragePooling2D(1, strides=2, name=f"{name}_subsample")(x) if halved else x
            x = _basic_block(x, shortcut, channels, name, 2 if halved else 1)
    return keras.Model(image, layers.GlobalAveragePooling2D(name="features")(x), name=f"cifar_resnet{depth}")


def wide_resnet(depth: int = 28, width: float = 4.0, dropout: float = 0.0) -> keras.Model:
    """WRN-28-4 (Zagoruyko and Komodakis 2016) as PB has it (section 6): each stage begins with stride 2.

    Three stages of (depth - 4) / 6 blocks, 16, 32, 64 channels times `width`; BN, ReLU, convolution, twice a block; 1x1
    projections where shapes change.

    Args:
      depth: 6 n + 4.
      width: of the stages.
      dropout: rate between the convolutions of a block.

    Raises:
      ConfigError: a depth that is not 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise errors.ConfigError(f"wide_resnet(depth={depth}): expected 6 n + 4, such as 16, 22, 28, 40")
    image = keras.Input((None, None, 3), name="image")
    x = _convolution(image, 16, "stem")
    for stage, base in enumerate((16, 32, 64), 1):
        channels = _channels("wide_resnet", width, base)
        for block in range(1, (depth - 4) // 6 + 1):
            name, stride = f"stage{stage}_block{block}", 2 if block == 1 else 1
            active = _bn_relu(x, f"{name}_1")
            changed = stride > 1 or x.shape[-1] != channels
            shortcut = _convolution(active, channels, f"{name}_shortcut", stride, size=1) if changed else x
            x = _convolution(active, channels, f"{name}_conv1", stride)
            x = _bn_relu(x, f"{name}_2")
            if dropout:
                x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
            x = layers.Add(name=f"{name}_sum")([_convolution(x, channels, f"{name}_conv2"), shortcut])
    x = layers.GlobalAveragePooling2D(name="features")(_bn_relu(x, "last"))
    return keras.Model(image, x, name=f"wide_resnet{depth}")


def with_batch_normalisation(model: keras.Model, name: str) -> keras.Model:
    """A chain of layers such as VGG-16 with a batch normalisation between each convolution and its activation.

    With scale `sqrt(1 + epsilon)` and statistics (0, 1) it computes what it did before, until it is trained.

    Args:
      model: a chain; each layer feeds the next one.
      name: of the new model.
    """
    image = x = keras.Input(model.input_shape[1:], name="image")
    for layer in model.layers[1:]:
        config = layer.get_config()
        if not isinstance(layer, layers.Conv2D):
            x = type(layer).from_config(config)(x)
            continue
        activation = config["activation"]
        convolution = type(layer).from_config({**config, "activation": "linear"})
        x = convolution(x)
        convolution.set_weights(layer.get_weights())
        normalisation = layers.BatchNormalization(epsilon=_BN_EPSILON, name=f"{layer.name}_bn")
        x = normalisation(x)
        normalisation.gamma.assign(ops.full(normalisation.gamma.shape, (1.0 + _BN_EPSILON) ** 0.5))
        x = layers.Activation(activation, name=f"{layer.name}_{activation}")(x)
    return keras.Model(image, x, name=name)


def _channels(network: str, width: float, base: int) -> int:
    if width <= 0:
        raise errors.ConfigError(f"{network}(width={width}): the width must be positive")
    return max(1, round(base * width))


def _convolution(x, channels: int, name: str, stride: int = 1, size: int = 3, padded: bool = True):
    """A convolution without bias; with stride 2 it is padded by one pixel on each side if `padded`, as in PyTorch's nets."""
    if stride > 1 and size > 1 and padded:
        x = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        return layers.Conv2D(channels, size, strides=stride, use_bias=False, name=name)(x)
    return layers.Conv2D(channels, size, strides=stride, padding="same", use_bias=False, name=name)(x)


def _bn_relu(x, name: str):
    x = layers.BatchNormalization(momentum=0.9, epsilon=_BN_EPSILON, name=f"{name}_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(x)


def _basic_block(x, shortcut, channels: int, name: str, stride: int, dropout: float = 0.0, padded: bool = True):
    """Convolution, BN, ReLU, convolution, BN, plus the shortcut, ReLU; names say stage and block."""
    missing = channels - shortcut.shape[-1]
    if missing:
        shortcut = ChannelPadding(missing // 2, missing - missing // 2, name=f"{name}_channels")(shortcut)
    x = _bn_relu(_convolution(x, channels, f"{name}_conv1", stride, padded=padded), f"{name}_1")
    if dropout:
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    x = _convolution(x, channels, f"{name}_conv2", padded=padded)
    x = layers.BatchNormalization(momentum=0.9, epsilon=_BN_EPSILON, name=f"{name}_2_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_sum")([x, shortcut]))
