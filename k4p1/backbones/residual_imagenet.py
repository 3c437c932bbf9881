"""ResNet-34 of He et al. 2016 for images of 224 pixels, as NetTailor uses it."""

import keras
from keras import layers

_BN_EPSILON = 1e-5
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))


def resnet34() -> keras.Model:
    """ResNet-34 (He et al. 2016, Table 1): 3, 4, 6 and 3 blocks of two 3x3 convolutions, 64 to 512 channels.

    Shortcuts are 1x1 projections where shapes change (option B); 21,284,672 parameters beside the classifier and moving
    statistics.
    """
    image = keras.Input((None, None, 3), name="image")
    x = layers.ZeroPadding2D(3, name="stem_pad")(image)
    x = layers.Conv2D(64, 7, strides=2, use_bias=False, name="stem")(x)
    x = layers.ReLU(name="stem_relu")(_normalised(x, "stem_bn"))
    x = layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
    x = layers.MaxPooling2D(3, strides=2, name="stem_pool")(x)
    for stage, (blocks, channels) in enumerate(_STAGES, 1):
        for block in range(1, blocks + 1):
            x = _block(x, channels, f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1)
    return keras.Model(image, layers.GlobalAveragePooling2D(name="features")(x), name="resnet34")


def _block(x, channels: int, name: str, stride: int):
    """Convolution, BN, ReLU, convolution, BN, plus the shortcut, ReLU."""
    shortcut = x
    if stride > 1:
        shortcut = layers.Conv2D(channels, 1, strides=stride, use_bias=False, name=f"{name}_shortcut")(x)
        shortcut = _normalised(shortcut, f"{name}_shortcut_bn")
    for number, step in ((1, stride), (2, 1)):
        x = layers.ZeroPadding2D(1, name=f"{name}_conv{number}_pad")(x)
        x = layers.Conv2D(channels, 3, strides=step, use_bias=False, name=f"{name}_conv{number}")(x)
        x = _normalised(x, f"{name}_{number}_bn")
        x = layers.ReLU(name=f"{name}_1_relu")(x) if number == 1 else x
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_sum")([x, shortcut]))


def _normalised(x, name: str):
    return layers.BatchNormalization(momentum=0.9, epsilon=_BN_EPSILON, name=name)(x)
