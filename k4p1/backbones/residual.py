"""Residual networks for small images: those of RA, of PB's Decathlon, and the CIFAR nets of He et al."""

import keras
from keras import layers, ops

from k4p1 import errors

FORMS = ("code", "text")
"""Of ResNet-26: as RA's authors run it, or as their text describes it."""

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


@keras.saving.register_keras_serializable("k4p1")
class CentralWindow(layers.Layer):
    """The `side` x `side` pixels in the middle of (batch, height, width, C); sides that are not longer stay whole.

    With images of 72 pixels that are shifted by up to 4 at random, a window of 64 shows what a random crop of 64 in 72 does
    (RA, section 4.1, as its authors run it), and the central crop wherever nothing is shifted: in tests, in serving.
    """

    def __init__(self, side: int, **kwargs):
        super().__init__(**kwargs)
        self.side = side

    def call(self, inputs):
        height, width = ops.shape(inputs)[1:3]
        top, left = _margin(height, self.side), _margin(width, self.side)
        return inputs[:, top : height - _margin(height, self.side, 1), left : width - _margin(width, self.side, 1)]

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        return (batch, *(side if side is None else min(side, self.side) for side in (height, width)), channels)

    def get_config(self):
        return {**super().get_config(), "side": self.side}


def _margin(length, side: int, odd: int = 0):
    """What a window leaves out on one side; `odd` is 1 on the side that has one pixel more where the rest is odd."""
    rest = max(length - side, 0) if isinstance(length, int) else ops.maximum(length - side, 0)
    return (rest + odd) // 2


def resnet26(width: float = 1.0, dropout: float = 0.0, form: str = "code", crop: int = 0) -> keras.Model:
    """RA's ResNet-26 (section 3.2): three stages of 4 blocks of two 3x3 convolutions, 64, 128, 256 channels times `width`.

    Shortcuts between resolutions are average pooled and filled up with zero channels.

    Args:
      width: multiplies the channels (RA, section 4.3: 0.5 to 2.5).
      dropout: rate before the second convolution of each block, as in wide residual nets.
      form: `code`, as the authors published it: every stage begins with stride 2, there is no ReLU behind the stem, and
        batch normalisation and ReLU stand behind the last block; 0.85 GMACs at 64 pixels. `text`, as section 3.2 says: the
        resolution is halved from a stage to the next, so the first stage works at full resolution; 3.4 GMACs.
      crop: sides of the central window that the network looks at; 0: the whole image. See `CentralWindow`.

    Raises:
      ConfigError: another form, or a width or crop that cannot be.
    """
    if form not in FORMS:
        raise errors.ConfigError(errors.unknown("form of resnet26", form, FORMS))
    first, *_ = stages = [_channels("resnet26", width, channels) for channels in (64, 128, 256)]
    image = keras.Input((None, None, 3), name="image")
    x = _convolution(_window(image, "resnet26", crop), max(1, first // 2), "stem", padded=False)
    x = _bn_relu(x, "stem") if form == "text" else _bn(x, "stem")
    for stage, channels in enumerate(stages, 1):
        for block in range(1, 5):
            halved = block == 1 and (stage > 1 or form == "code")
            shortcut = layers.AveragePooling2D(2, padding="same", name=f"stage{stage}_block{block}_pool")(x) if halved else x
            name, padded = f"stage{stage}_block{block}", form == "code"
            x = _basic_block(x, shortcut, channels, name, 2 if halved else 1, dropout, padded=padded)
    x = _bn_relu(x, "last") if form == "code" else x
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


def wide_resnet(depth: int = 28, width: float = 4.0, dropout: float = 0.0, crop: int = 0) -> keras.Model:
    """WRN-28-4 (Zagoruyko and Komodakis 2016) as PB has it (section 6): each stage begins with stride 2.

    Three stages of (depth - 4) / 6 blocks, 16, 32, 64 channels times `width`; BN, ReLU, convolution, twice a block; 1x1
    projections where shapes change.

    Args:
      depth: 6 n + 4.
      width: of the stages.
      dropout: rate between the convolutions of a block.
      crop: sides of the central window that the network looks at; 0: the whole image. See `CentralWindow`.

    Raises:
      ConfigError: a depth that is not 6 n + 4, or a width or crop that cannot be.
    """
    if depth < 10 or (depth - 4) % 6:
        raise errors.ConfigError(f"wide_resnet(depth={depth}): expected 6 n + 4, such as 16, 22, 28, 40")
    image = keras.Input((None, None, 3), name="image")
    x = _convolution(_window(image, "wide_resnet", crop), 16, "stem")
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


def _window(image, network: str, crop: int):
    if not isinstance(crop, int) or isinstance(crop, bool) or crop < 0:
        raise errors.ConfigError(f"{network}(crop={crop!r}): expected a number of pixels, or 0 for the whole image")
    return CentralWindow(crop, name="window")(image) if crop else image


def _bn(x, name: str):
    return layers.BatchNormalization(momentum=0.9, epsilon=_BN_EPSILON, name=f"{name}_bn")(x)


def _bn_relu(x, name: str):
    return layers.ReLU(name=f"{name}_relu")(_bn(x, name))


def _basic_block(x, shortcut, channels: int, name: str, stride: int, dropout: float = 0.0, padded: bool = True):
    """Convolution, BN, ReLU, convolution, BN, plus the shortcut, ReLU; names say stage and block."""
    missing = channels - shortcut.shape[-1]
    if missing:
        shortcut = ChannelPadding(missing // 2, missing - missing // 2, name=f"{name}_channels")(shortcut)
    x = _bn_relu(_convolution(x, channels, f"{name}_conv1", stride, padded=padded), f"{name}_1")
    if dropout:
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    x = _convolution(x, channels, f"{name}_conv2", padded=padded)
    x = _bn(x, f"{name}_2")
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_sum")([x, shortcut]))
