"""VGG-16 with batch normalisation, as PB uses it (section 4), with or without fc6 and fc7."""

import keras
from keras import layers, ops

from k4p1 import errors

_BN_EPSILON = 1e-5
_FULLY_CONNECTED = {"fc6": "fc1", "fc7": "fc2"}  # ours, and Keras' name of the same layer
_UNITS, _MAP_SIDE = 4096, 7
MINIMUM_SIZE = 32 * _MAP_SIDE
"""The smallest image that fc6 fits on, in pixels."""


def vgg16_bn(weights: str | None = None, fully_connected: bool = False, dropout: float = 0.0) -> keras.Model:
    """VGG-16 with a batch normalisation behind each of its 13 convolutions.

    Args:
      weights: None (random), `imagenet`, or the path of a Keras weight file of VGG-16: without its classifier, or with
        all of it where `fully_connected` asks for fc6 and fc7.
      fully_connected: whether the features are those of fc7 (4,096) in place of the averages of the last maps (512). fc6 and
        fc7 are written as convolutions with 7x7 and 1x1 kernels, which compute the same on images of 224 pixels and also
        take larger ones.
      dropout: rate behind fc6 and fc7 (VGG: 0.5).

    Raises:
      ConfigError: dropout without fc6 and fc7.
    """
    if dropout and not fully_connected:
        raise errors.ConfigError(
            f"vgg16_bn(dropout={dropout}): it acts behind fc6 and fc7; add fully_connected=True, or drop features before "
            "the head with Task.dropout"
        )
    if not fully_connected:
        plain = keras.applications.VGG16(input_shape=(None, None, 3), include_top=False, pooling="avg", weights=weights)
        return with_batch_normalisation(plain, "vgg16_bn")
    convolutions = keras.applications.VGG16(input_shape=(None, None, 3), include_top=False, weights=None)
    whole = keras.applications.VGG16(weights=weights) if weights else None
    if whole is not None:
        for layer in convolutions.layers:
            layer.set_weights(whole.get_layer(layer.name).get_weights() if layer.weights else [])
    network = with_batch_normalisation(convolutions, "vgg16_bn")
    x = network.output
    for (name, original), side in zip(_FULLY_CONNECTED.items(), (_MAP_SIDE, 1), strict=True):
        layer = layers.Conv2D(_UNITS, side, activation="relu", name=name)
        x = layer(x)
        if whole is not None:
            kernel, bias = whole.get_layer(original).get_weights()
            layer.set_weights([as_convolution(kernel, side), bias])
        if dropout:
            x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return keras.Model(network.input, layers.GlobalAveragePooling2D(name="features")(x), name="vgg16_bn")


def as_convolution(kernel, side: int):
    """The kernel (side, side, C, D) that does on maps of `side` x `side` what a dense one (side^2 C, D) does."""
    return kernel.reshape(side, side, -1, kernel.shape[-1])


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
