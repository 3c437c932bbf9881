"""A task's network for inference: normalisation is part of the layer before it, and the answers stay."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from k4p1 import backbones
from k4p1.backbones.residual import ChannelPadding
from k4p1.patches.apply import apply_patches
from k4p1.patches.inference import inference_model


def model_of(function, size=9):
    """A model of a function of images, with values away from the initial ones."""
    keras.utils.set_random_seed(0)
    image = keras.Input((size, size, 3))
    model = keras.Model(image, function(image))
    random = np.random.default_rng(0)
    for variable in model.variables:
        values = random.normal(0.0, 0.5, variable.shape)
        variable.assign(0.5 + np.abs(values) if variable.name in ("gamma", "moving_variance") else values)
    return model


def pictures(size=9):
    return np.random.default_rng(1).uniform(size=(2, size, size, 3)).astype("float32")


def check(model, folded, kept, size=9):
    made = inference_model(model)
    assert (made.normalisations_folded, made.normalisations_kept) == (folded, kept)
    expected = np.asarray(model(pictures(size)))
    np.testing.assert_allclose(made.model(pictures(size)), expected, atol=1e-5 * max(1.0, np.abs(expected).max()))
    assert sum(isinstance(layer, layers.BatchNormalization) for layer in made.model.layers) == kept
    assert not {id(v) for v in made.model.variables} & {id(v) for v in model.variables}
    return made.model


def normalised(layer, **options):
    return lambda x: layers.BatchNormalization(**options)(layer(x))


@pytest.mark.parametrize(
    ("bias", "options"), [(True, {}), (False, {"scale": False}), (False, {"center": False, "epsilon": 0.1})], ids=str
)
@pytest.mark.parametrize(
    "layer",
    [
        lambda bias: layers.Conv2D(4, 3, strides=2, padding="same", use_bias=bias),
        lambda bias: layers.Conv2D(6, 3, groups=3, use_bias=bias),
        lambda bias: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=bias),
        lambda bias: layers.SeparableConv2D(5, 3, depth_multiplier=2, use_bias=bias),
        lambda bias: layers.Conv2DTranspose(5, 3, strides=2, use_bias=bias),
        lambda bias: layers.Dense(4, use_bias=bias),
    ],
    ids=["conv", "grouped", "depthwise", "separable", "transposed", "dense"],
)
def test_normalisation_becomes_part_of_the_layer_before_it(layer, options, bias):
    check(model_of(normalised(layer(bias), **options)), folded=1, kept=0)


def test_two_consumers_of_a_layer_leave_its_normalisation():
    def function(x):
        y = layers.Conv2D(4, 3)(x)
        return layers.BatchNormalization()(y) + y

    check(model_of(function), folded=0, kept=1)


def test_a_layer_that_is_called_twice_keeps_its_normalisation():
    def function(x):
        convolution, normalisation = layers.Conv2D(3, 3), layers.BatchNormalization()
        return layers.BatchNormalization()(convolution(normalisation(convolution(x))))

    check(model_of(function), folded=0, kept=2)


def test_a_normalisation_that_is_called_twice_stays():
    def function(x):
        normalisation = layers.BatchNormalization()
        return normalisation(layers.Conv2D(4, 1)(x)) + normalisation(layers.Conv2D(4, 1)(x))

    check(model_of(function), folded=0, kept=1)


def test_activations_inputs_and_other_axes_leave_it():
    def function(x):
        x = layers.BatchNormalization()(x)
        x = normalised(layers.Conv2D(4, 3, activation="relu"))(x)
        return layers.BatchNormalization(axis=1)(layers.Conv2D(4, 3)(x))

    check(model_of(function), folded=0, kept=3)


def test_the_output_of_a_model_stays_an_output():
    def function(x):
        y = layers.Conv2D(4, 3)(x)
        return {"plain": y, "normalised": layers.BatchNormalization()(y)}

    made = inference_model(model_of(function))
    assert (made.normalisations_folded, made.normalisations_kept) == (0, 1)
    assert set(made.model.output) == {"plain", "normalised"}


def test_inner_models_are_opened():
    def function(x):
        inner = keras.Sequential([layers.Conv2D(4, 3, use_bias=False), layers.BatchNormalization(), layers.ReLU()])
        return normalised(layers.Conv2D(4, 1))(inner(x))

    made = check(model_of(function), folded=2, kept=0)
    assert not any(isinstance(layer, keras.Model) for layer in made.layers)


@pytest.mark.parametrize(
    ("scaling", "spec"),
    [
        ("none", "mask+scale_bias+head"),
        ("unit", "series_adapter(layers=stem)+scale_bias+depthwise+head"),
        ("symmetric", "head"),
        ("imagenet", "scale_bias+head"),
        ("caffe", "scale_bias+head"),
    ],
)
def test_a_task_model_and_its_pixels(small_backbone, scaling, spec, images):
    backbone = backbones.Backbone(small_backbone.model, "small", small_backbone.config, scaling)
    patched = apply_patches(backbone, spec, classes=3, image_size=16)
    made = inference_model(patched.model)
    assert (made.normalisations_folded, made.normalisations_kept) == (3, 0)
    expected = np.asarray(patched.model(images))
    np.testing.assert_allclose(made.model(images), expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.slow
def test_it_is_read_by_keras_alone(tmp_path, images):
    """A folded network holds no class of k4p1."""

    def function(x):
        return layers.GlobalAveragePooling2D()(ChannelPadding(1, 2)(normalised(layers.Conv2D(4, 3))(x)))

    backbone = backbones.from_model(model_of(function, 16), scaling="caffe")
    patched = apply_patches(backbone, "scale_bias+head", classes=3, image_size=16)
    inference_model(patched.model).model.save(tmp_path / "task.keras")
    np.save(tmp_path / "images.npy", images)
    program = (
        "import sys, keras, numpy as np\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "assert not any(name.startswith('k4p1') for name in sys.modules)\n"
        "np.save(sys.argv[3], np.asarray(model(np.load(sys.argv[2]))))\n"
    )
    paths = [str(tmp_path / name) for name in ("task.keras", "images.npy", "answers.npy")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, cwd=tmp_path, capture_output=True)
    np.testing.assert_allclose(np.load(paths[2]), patched.model(images), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "folded", "kept"), [("DenseNet121", 59, 62), ("ResNet50V2", 32, 17)])
def test_what_no_convolution_precedes_stays(network, folded, kept):
    patched = apply_patches(backbones.application(network), "scale_bias+head", classes=3, image_size=32)
    made = inference_model(patched.model)
    assert (made.normalisations_folded, made.normalisations_kept) == (folded, kept)
