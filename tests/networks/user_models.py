"""Shapes of networks that users bring, small: `ACCEPTED` become backbones, `REFUSED` are refused at once.

The tests, and `benchmarks/networks.py`, which tries each of them from training to export, use this list. To add a shape,
add a function from an image tensor to features or a feature map, with `@accepted("what is special about it")`.
"""

from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

SIDE = 16
ACCEPTED: dict[str, Callable[[], keras.Model]] = {}
REFUSED: dict[str, tuple[Callable[[], object], str]] = {}
"""What is special about it to (a function that makes the model, what the refusal says)."""


def accepted(name: str, shape=(None, None, 3), precision: str = "float32", model_name: str | None = None):
    """Registers a function from the image to features as a shape."""

    def register(body: Callable) -> Callable:
        def make() -> keras.Model:
            keras.utils.set_random_seed(0)
            before = keras.config.dtype_policy()
            keras.config.set_dtype_policy(precision)
            try:
                image = keras.Input(shape)
                features = body(image)
                if len(features.shape) == 4:
                    features = layers.GlobalAveragePooling2D()(features)
                return keras.Model(image, features, name=model_name)
            finally:
                keras.config.set_dtype_policy(before)

        ACCEPTED[name] = make
        return body

    return register


def refused(name: str, says: str):
    """Registers a function that makes a model as one that no backbone can be made of."""

    def register(make: Callable) -> Callable:
        REFUSED[name] = make, says
        return make

    return register


def convolution(x, channels: int = 4, **how):
    """A convolution with batch normalisation."""
    return layers.BatchNormalization()(layers.Conv2D(channels, 3, padding="same", **how)(x))


def inner(channels: int = 4, given: int = 4, name: str | None = None) -> keras.Model:
    """A functional model of open size."""
    image = keras.Input((None, None, given))
    return keras.Model(image, layers.ReLU()(convolution(image, channels)), name=name)


def tokens(x):
    """A sequence (batch, 16, 8) of patches of 4 x 4 pixels."""
    return layers.Reshape((16, 8))(layers.Conv2D(8, 4, strides=4)(x))


@keras.saving.register_keras_serializable("zoo")
class Block(layers.Layer):
    """A composite layer: convolution, two batch normalisations and dropout inside."""

    def __init__(self, channels=4, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.convolution = layers.Conv2D(channels, 3, padding="same")
        self.normalisations = [layers.BatchNormalization(momentum=0.9), layers.BatchNormalization(momentum=0.8)]
        self.dropout = layers.Dropout(0.1)

    def build(self, shape):
        self.convolution.build(shape)
        for normalisation in self.normalisations:
            normalisation.build((*shape[:-1], self.channels))

    def call(self, x, training=None):
        x = self.convolution(x)
        for normalisation in self.normalisations:
            x = ops.relu(normalisation(x, training=training))
        return self.dropout(x, training=training)

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


@keras.saving.register_keras_serializable("zoo")
class Stack(layers.Layer):
    """A composite layer of composite layers that are built when they are first called."""

    def __init__(self, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.blocks = {f"block_{number}": Block() for number in range(depth)}

    def call(self, x, training=None):
        for block in self.blocks.values():
            x = x + block(x, training=training)
        return x

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


@keras.saving.register_keras_serializable("zoo")
class SharedScale(layers.Layer):
    """A layer of its own with a weight, a state that never moves, and an argument that is a list."""

    def __init__(self, powers=(1.0, 2.0), **kwargs):
        super().__init__(**kwargs)
        self.powers = list(powers)

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")
        self.offset = self.add_weight(name="offset", shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, x):
        return sum(self.scale * ops.abs(x) ** power for power in self.powers) + self.offset

    def get_config(self):
        return {**super().get_config(), "powers": self.powers}


@accepted("inner functional model, twice nested")
def _(x):
    image = keras.Input((None, None, 3))
    middle = keras.Model(image, inner()(convolution(image)))
    return middle(layers.Rescaling(2.0)(x))


@accepted("inner Sequential, twice nested, of open size")
def _(x):
    deepest = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization()])
    return keras.Sequential([layers.Conv2D(4, 3, padding="same"), deepest, layers.ReLU()])(x)


@accepted("inner model called twice")
def _(x):
    shared = inner()
    return shared(shared(convolution(x)))


@accepted("inner Sequential called twice, its outputs subtracted")
def _(x):
    shared = keras.Sequential([layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization()])
    x = convolution(x)
    return shared(x) - shared(2.0 * x)


@accepted("inner model of two inputs and two outputs")
def _(x):
    one, two = keras.Input((None, None, 4)), keras.Input((None, None, 4))
    both = keras.Model([one, two], [layers.Conv2D(4, 1)(one - two), layers.Conv2D(4, 1)(one * two)])
    left, right = both([convolution(x), convolution(x)])
    return layers.Concatenate()([left, right])


@accepted("augmentation, then a network: the usual transfer model")
def _(x):
    augment = keras.Sequential([layers.RandomFlip("horizontal"), layers.RandomRotation(0.1), layers.RandomZoom(0.1)])
    return inner(given=3)(augment(x))


@accepted("Rescaling and Normalization with constants")
def _(x):
    return convolution(layers.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.1, 0.2, 0.3])(layers.Rescaling(0.5)(x)))


@accepted("adapted Normalization")
def _(x):
    normalization = layers.Normalization()
    normalization.adapt(np.random.default_rng(0).uniform(size=(8, 4, 4, 3)).astype("float32"))
    return convolution(normalization(x))


@accepted("Resizing, CenterCrop and ZeroPadding2D inside")
def _(x):
    return layers.CenterCrop(8, 8)(convolution(layers.ZeroPadding2D(1)(layers.Resizing(12, 12)(x))))


@accepted("layer called twice")
def _(x):
    shared, x = layers.Conv2D(4, 3, padding="same"), convolution(x)
    return shared(layers.BatchNormalization()(shared(x)))


@accepted("batch normalisation called twice")
def _(x):
    shared = layers.BatchNormalization()
    return shared(layers.Conv2D(4, 3)(shared(layers.Conv2D(4, 3)(x))))


@accepted("MultiHeadAttention, LayerNormalization, Dense: a transformer", (SIDE, SIDE, 3))
def _(x):
    x = tokens(x)
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 4, dropout=0.1)(y, y)
    y = layers.Dense(16, activation="gelu")(layers.LayerNormalization()(x))
    return layers.GlobalAveragePooling1D()(x + layers.Dropout(0.1)(layers.Dense(8)(y)))


@accepted("MultiHeadAttention with operands by name, and GroupQueryAttention", (SIDE, SIDE, 3))
def _(x):
    x = tokens(x)
    x = layers.MultiHeadAttention(2, 4)(query=x, value=x, key=x)
    return layers.GlobalAveragePooling1D()(layers.GroupQueryAttention(4, 4, 2)(x, x))


@accepted("EinsumDense", (SIDE, SIDE, 3))
def _(x):
    return layers.GlobalAveragePooling1D()(
        layers.EinsumDense("abc,cd->abd", output_shape=(None, 6), bias_axes="d")(tokens(x))
    )


@accepted("LayerNormalization and GroupNormalization of convolutions")
def _(x):
    x = layers.LayerNormalization()(layers.Conv2D(4, 3)(x))
    return layers.GroupNormalization(2)(layers.Conv2D(4, 3)(x))


@accepted("composite layer with batch normalisation inside")
def _(x):
    return Block()(convolution(x))


@accepted("composite layers in composite layers, built when called")
def _(x):
    return Stack()(convolution(x))


@accepted("user's layer with a weight, a state and a list as argument")
def _(x):
    return SharedScale([1.0, 0.5])(convolution(x))


@accepted("Bidirectional LSTM", (SIDE, SIDE, 3))
def _(x):
    return layers.Bidirectional(layers.LSTM(4))(tokens(x))


@accepted("TimeDistributed and GRU", (SIDE, SIDE, 3))
def _(x):
    return layers.GRU(4)(layers.TimeDistributed(layers.Dense(6))(tokens(x)))


@accepted("ConvLSTM and Conv3D on a sequence of one image", (SIDE, SIDE, 3))
def _(x):
    x = layers.Conv3D(4, (1, 3, 3))(layers.Reshape((1, SIDE, SIDE, 3))(x))
    return layers.ConvLSTM2D(4, 3)(x)


@accepted("causal, dilated and strided Conv1D", (SIDE, SIDE, 3))
def _(x):
    x = layers.Conv1D(8, 3, padding="causal", dilation_rate=2, activation="relu")(tokens(x))
    return layers.GlobalMaxPooling1D()(layers.Conv1D(6, 3, padding="causal", strides=2)(x))


@accepted("depthwise, separable, grouped, transposed convolutions and PReLU")
def _(x):
    x = layers.PReLU(shared_axes=[1, 2])(layers.SeparableConv2D(8, 3, padding="same")(x))
    x = layers.Conv2D(8, 3, groups=2, padding="same")(layers.DepthwiseConv2D(3, depth_multiplier=1)(x))
    return layers.UpSampling2D()(layers.Conv2DTranspose(4, 3, strides=2, output_padding=1)(x))


@accepted("slices and indices")
def _(x):
    x = convolution(x, 8)
    return x[:, ::2, 1:-1, :4] + x[:, 1::2, 1:-1, 4:]


@accepted("ellipsis and new axes", (SIDE, SIDE, 3))
def _(x):
    x = convolution(x)[..., None, :2]
    return layers.Flatten()(layers.AveragePooling2D(4)(x[:, :, :, 0]))


@accepted("operators, operands in every order")
def _(x):
    x = convolution(x)
    y = (1.0 - x) * (x - 0.5) + 2.0 / (1.0 + x * x) - (x * x + 1.0) / 2.0
    return abs(-y) ** 0.5 + 1.5**y + (3.0 + y) % 2.0 + y // 2.0


@accepted("numpy constants as operands, on either side")
def _(x):
    doubled = convolution(x) * np.full((1, 1, 1, 4), 2.0, "float32")
    return ops.subtract(np.arange(1, 5, dtype="float32"), doubled) + np.float32(0.5)


@accepted("functions of keras.ops, with lists and axes")
def _(x):
    x = convolution(x)
    x = ops.concatenate([ops.stack([x, 2.0 * x], axis=-1)[..., 0], ops.flip(x, axis=1)], axis=-1)
    return ops.where(x > 0.0, x, 0.1 * x) + ops.mean(x, axis=(1, 2), keepdims=True)


@accepted("matrix product, einsum and softmax by keras.ops", (SIDE, SIDE, 3))
def _(x):
    x = tokens(x)
    weights = ops.softmax(ops.matmul(x, ops.transpose(x, (0, 2, 1))) / 8.0**0.5, axis=-1)
    return ops.mean(ops.einsum("bij,bjc->bic", weights, x), axis=1)


@accepted("numpy numbers in arguments")
def _(x):
    return layers.ReLU(max_value=np.float32(6))(convolution(x, np.int64(4), dilation_rate=(np.int64(1), np.int32(1))))


@accepted("squeeze and excitation: products of a map and its mean")
def _(x):
    x = convolution(x, 8)
    gate = layers.Dense(8, "sigmoid")(layers.Dense(2, "relu")(layers.GlobalAveragePooling2D(keepdims=True)(x)))
    return layers.Multiply()([x, gate])


@accepted("channels first", (SIDE, SIDE, 3))
def _(x):
    how = {"padding": "same", "data_format": "channels_first"}
    x = layers.Permute((3, 1, 2))(x)
    x = layers.BatchNormalization(axis=1)(layers.Conv2D(4, 3, strides=2, **how)(x))
    return layers.GlobalAveragePooling2D(data_format="channels_first")(layers.Conv2D(6, 1, **how)(x))


@accepted("mixed precision (bfloat16)", precision="mixed_bfloat16")
def _(x):
    return inner()(convolution(x))


@accepted("mixed precision (float16), layers of float32 among them", precision="mixed_float16")
def _(x):
    return layers.Activation("relu", dtype="float32")(layers.Conv2D(4, 3, dtype="float32")(convolution(x)))


@accepted("model named head, layers named logits, image, features, scaled_image, input_scaling", model_name="head")
def _(x):
    for name in ("logits", "image", "features", "scaled_image", "input_scaling", "head"):
        x = layers.Conv2D(4, 3, padding="same", name=name)(x)
    return layers.BatchNormalization(name="input")(x)


@accepted("inner models named logits and image", model_name="logits")
def _(x):
    return inner(name="logits")(inner(given=3, name="image")(x))


@accepted("layers with names like numbers and slashes of Keras")
def _(x):
    x = layers.Conv2D(4, 3, name="conv2d_7")(x)
    return layers.BatchNormalization(name="conv2d")(layers.Conv2D(4, 3, name="7")(x))


@accepted("regularisers, constraints and noise")
def _(x):
    how = {"kernel_regularizer": "l2", "kernel_constraint": "max_norm", "activity_regularizer": "l2"}
    x = layers.SpatialDropout2D(0.1)(convolution(x, **how))
    return layers.Conv2D(4, 3, kernel_regularizer=keras.regularizers.L1L2(1e-4, 1e-3))(layers.GaussianNoise(0.1)(x))


@accepted("frozen layers and normalisation in inference mode")
def _(x):
    frozen = layers.Conv2D(4, 3)
    frozen.trainable = False
    return layers.BatchNormalization()(frozen(x), training=False)


@accepted("Embedding of quantised pixels", (SIDE, SIDE, 3))
def _(x):
    codes = ops.cast(ops.clip(ops.mean(tokens(x), -1), 0.0, 3.0), "int32")
    return layers.GlobalAveragePooling1D()(layers.Embedding(4, 6)(codes))


@accepted("network of keras.applications inside")
def _(x):
    how = {"include_top": False, "weights": None, "input_shape": (None, None, 3)}
    base = keras.applications.MobileNetV2(alpha=0.35, **how)
    return base(layers.Rescaling(2.0, -1.0)(layers.Resizing(32, 32)(x)))


def image(**kwargs):
    """An input of fixed size."""
    return keras.Input((SIDE, SIDE, 3), **kwargs)


@refused("Lambda", "has a Lambda layer, 'lambda_0', whose Python function no file can hold; write it with operators")
def _():
    i = image()
    return keras.Model(i, layers.Flatten()(layers.Lambda(lambda t: 2 * t)(i)))


@refused("Lambda in an inner model", "'sequential_0/lambda_0'")
def _():
    i = image()
    return keras.Model(i, layers.Flatten()(keras.Sequential([layers.Lambda(lambda t: 2 * t)])(i)))


@refused("Python function as activation", "cannot be read again from a file because of layer 'doubled'")
def _():
    i = image()
    return keras.Model(i, layers.Flatten()(layers.Conv2D(4, 3, activation=lambda t: 2 * t, name="doubled")(i)))


@refused("list as input", "must be a functional keras.Model from one tensor of images to one tensor")
def _():
    i = image()
    return keras.Model([i], layers.Flatten()(i))


@refused("dictionary as input", "must be a functional keras.Model from one tensor of images to one tensor")
def _():
    i = image()
    return keras.Model({"image": i}, layers.Flatten()(i))


@refused("two outputs", "must be a functional keras.Model from one tensor of images to one tensor")
def _():
    i = image()
    return keras.Model(i, [layers.Flatten()(i), i])


@refused("dictionary as output", "must be a functional keras.Model from one tensor of images to one tensor")
def _():
    i = image()
    return keras.Model(i, {"a": layers.Flatten()(i)})


@refused("Sequential as the whole network", "must be a functional keras.Model from one tensor of images to one tensor")
def _():
    return keras.Sequential([image(), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D()])


@refused("subclassed model", "must be a functional keras.Model from one tensor of images to one tensor")
def _():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    return Subclassed()


@refused("layer that is not registered", "register it with keras.saving.register_keras_serializable")
def _():
    class Unregistered(layers.Layer):
        def call(self, x):
            return x

    i = image()
    return keras.Model(i, layers.Flatten()(Unregistered()(i)))


@refused("inner model at two levels of nesting", "at two levels of nesting")
def _():
    i, j, shared = image(), keras.Input((None, None, 4)), inner()
    middle = keras.Model(j, shared(layers.Conv2D(4, 3, padding="same")(j)))
    return keras.Model(i, layers.GlobalAveragePooling2D()(middle(shared(layers.Conv2D(4, 3)(i)))))


@refused("layer that changes shared values while it trains", "'spectral_normalization_0' (SpectralNormalization)")
def _():
    i = image()
    return keras.Model(i, layers.Flatten()(layers.SpectralNormalization(layers.Conv2D(4, 3))(i)))
