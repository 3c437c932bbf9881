"""Networks that compute something else have another structure; one that was written and read has the same."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

from k4p1 import backbones, errors
from k4p1.backbones import build, structure


def backbone_of(function, shape=(None, None, 3)):
    keras.utils.set_random_seed(0)
    image = keras.Input(shape)
    features = function(layers.Conv2D(4, 3, padding="same", name="first")(image))
    if len(features.shape) == 4:
        features = layers.GlobalAveragePooling2D(name="pooled")(features)
    return backbones.from_model(keras.Model(image, features), scaling="unit")


def convolution(**settings):
    return layers.Conv2D(4, 3, padding="same", name="shared", **settings)


def used_twice(combine):
    def function(x):
        layer = convolution()
        return combine(layer, x, layer(x))

    return function


PAIRS = {
    "operands": (lambda x: 1.0 - x, lambda x: x - 1.0),
    "power": (lambda x: x**2.0, lambda x: 2.0**x),
    "casts": (
        lambda x: ops.cast(ops.cast(9.0 * x, "int32"), "float32"),
        lambda x: ops.cast(ops.cast(9.0 * x, "float32"), "float32"),
    ),
    "constants": (lambda x: x * np.ones(4, "float32"), lambda x: x * np.full(4, 2.0, "float32")),
    "slices": (lambda x: x[:, ::2], lambda x: x[:, 1::2]),
    "order of a concatenation": (
        lambda x: ops.concatenate([x, 2.0 * x], axis=-1),
        lambda x: ops.concatenate([2.0 * x, x], axis=-1),
    ),
    "normalization": (
        layers.Normalization(mean=[0.0] * 4, variance=[1.0] * 4, name="n"),
        layers.Normalization(mean=[0.5] * 4, variance=[0.1] * 4, name="n"),
    ),
    "resizing": (layers.Resizing(8, 8, name="r"), layers.Resizing(9, 8, name="r")),
    "crop": (layers.CenterCrop(8, 8, name="c"), layers.CenterCrop(7, 8, name="c")),
    "elu": (layers.ELU(1.0, name="e"), layers.ELU(0.5, name="e")),
    "permute": (layers.Permute((1, 2, 3), name="p"), layers.Permute((2, 1, 3), name="p")),
    "transposed convolution": (
        layers.Conv2DTranspose(4, 3, strides=2, output_padding=1, name="t"),
        layers.Conv2DTranspose(4, 3, strides=2, output_padding=0, name="t"),
    ),
    "activation": (convolution(activation="gelu"), convolution(activation="relu")),
    "call of a layer": (used_twice(lambda f, x, y: y + 2.0 * f(y)), used_twice(lambda f, x, y: f(y) + 2.0 * y)),
    "number of calls": (used_twice(lambda f, x, y: y), used_twice(lambda f, x, y: f(y))),
    "mode": (
        lambda x: layers.BatchNormalization(name="b")(x, training=False),
        lambda x: layers.BatchNormalization(name="b")(x),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_another_function_is_another_structure_and_reading_keeps_it(pair):
    hashes = []
    for function in PAIRS[pair]:
        backbone = backbone_of(function)
        hashes.append(backbone.structure_hash())
        again = build.from_config(backbone.name, json.loads(json.dumps(backbone.config)), backbone.scaling)
        assert again.structure_hash() == hashes[-1]
        again.assign(backbone.tensors())
        images = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype("float32")
        np.testing.assert_allclose(again.model(images), backbone.model(images), atol=1e-6)
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    "twin",
    [
        lambda: layers.Conv2D(4, 3, name="c", kernel_initializer="he_normal"),
        lambda: layers.Conv2D(4, 3, name="c", dtype="bfloat16"),
        lambda: layers.Conv2D(np.int64(4), 3, name="c"),
        lambda: layers.Conv2D(4, 3, name="c", trainable=False),
    ],
)
def test_what_does_not_change_the_function_does_not_count(twin):
    assert backbone_of(twin()).structure_hash() == backbone_of(layers.Conv2D(4, 3, name="c")).structure_hash()


def test_calls_outside_of_the_model_do_not_count():
    plain = backbone_of(convolution()).structure_hash()

    def function(x):
        layer = convolution()
        layer(layer(x))
        layer(keras.Input((8, 8, 4)))
        return layer(x)

    assert backbone_of(function).structure_hash() == plain


def test_a_setting_that_a_later_keras_adds_changes_no_hash():
    class Scaled(layers.Layer):
        def call(self, x):
            return 2.0 * x

    class Later(Scaled):
        def __init__(self, approximate=False, quantization_config=None, **kwargs):
            super().__init__(**kwargs)
            self.added = {"approximate": approximate, "quantization_config": quantization_config}

        def get_config(self):
            return {**super().get_config(), **self.added}

    described = []
    for layer in (Scaled(name="s"), Later(name="s"), Later(approximate=True, name="s")):
        given = keras.Input((8, 8, 3))
        described.append([[one[0], *one[2:]] for one in structure.describe(keras.Model(given, layer(given)))])
    assert described[0] == described[1] != described[2]


def unregistered():
    class Unregistered(layers.Layer):
        def call(self, x):
            return x

    return Unregistered()


@keras.saving.register_keras_serializable("tests")
class Forgetful(layers.Layer):
    """Forgets its argument when it is written."""

    def __init__(self, units=1, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.scale = self.add_weight(shape=(self.units,), name="scale")

    def call(self, x):
        return x

    def get_config(self):
        return {"name": self.name}


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (lambda x: layers.Lambda(lambda t: 2 * t)(x), ["Lambda layer, 'lambda_0'", "keras.ops", "registered"]),
        (lambda x: keras.Sequential([layers.Lambda(lambda t: 2 * t)], name="inner")(x), ["'inner/lambda_0'"]),
        (unregistered(), ["'unregistered_0' (Unregistered)", "register_keras_serializable"]),
        (Forgetful(3), ["'forgetful_0' (Forgetful)", "get_config must return every argument"]),
        (layers.Conv2D(4, 3, activation=lambda t: 2 * t, name="doubled"), ["'doubled' (Conv2D)"]),
    ],
)
def test_a_network_that_no_file_can_hold_is_refused_at_once(function, parts):
    with pytest.raises(errors.ConfigError) as caught:
        backbone_of(function)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def image(**kwargs):
    return keras.Input((16, 16, 3), **kwargs)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda i: keras.Model([i], layers.Flatten()(i)), "one from"),
        (lambda i: keras.Model({"image": i}, layers.Flatten()(i)), "one from"),
        (lambda i: keras.Model(i, [layers.Flatten()(i)]), "one from"),
        (lambda i: keras.Model(i, {"a": layers.Flatten()(i)}), "one from"),
        (lambda i: keras.Sequential([layers.Flatten()]), "a Sequential"),
    ],
)
def test_lists_and_dictionaries_are_refused_at_once(make, part):
    with pytest.raises(errors.ConfigError, match=f"one tensor of images to one tensor of features; got {part}"):
        backbones.from_model(make(image()))


@pytest.mark.slow
def test_the_rescaling_of_imagenet_weights_is_written_and_read(tmp_path):
    """Keras adds it to EfficientNetB* for the name `imagenet` alone, and a file holds no such name."""
    without = backbones.application("EfficientNetB0")
    without.model.save_weights(tmp_path / "imagenet.weights.h5")
    backbone = backbones.application("EfficientNetB0", weights=tmp_path / "imagenet.weights.h5", imagenet_rescaling=True)
    names = [operation.name for operation in backbone.model.operations]
    assert names[1:4] == ["rescaling_0", "normalization_0", "rescaling_1"]
    assert backbone.structure_hash() != without.structure_hash()
    assert build.from_config("EfficientNetB0", backbone.config, "none").structure_hash() == backbone.structure_hash()
    for key, value in backbone.tensors().items():
        np.testing.assert_array_equal(value, without.tensors()[key])
    with pytest.raises(errors.ConfigError, match="only EfficientNetB0 to B7 have it"):
        backbones.application("MobileNetV2", imagenet_rescaling=True)


def test_a_version_that_is_not_known_is_refused():
    with pytest.raises(errors.ArtifactError, match="structures of version 3 are unknown"):
        structure.describe(keras.Sequential(), version=3)
