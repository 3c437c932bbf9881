"""Folding: a plain network of the same function at the unpatched network's cost."""

import keras
import numpy as np
import pytest
from keras import layers

from k4p1 import backbones
from k4p1.patches.apply import apply_patches
from k4p1.patches.fold import fold
from k4p1.patches.patched_layer import LayerPatch, PatchedLayer


def trained_task(backbone, spec, **options):
    """A task whose private values are not those it started with."""
    patched = apply_patches(backbone, spec, **{"classes": 3, "image_size": 16, **options})
    random = np.random.default_rng(0)
    for variable in patched.private().values():
        variable.assign(random.uniform(0.4, 1.4, variable.shape))
    return patched


def layer_classes(model):
    return [type(layer).__name__ for layer in model._flatten_layers() if not isinstance(layer, keras.Model)]


@pytest.mark.parametrize(
    "spec",
    ["none", "scale_bias+depthwise+head", "scale_bias(statistics=frozen)+head", "scale_bias(affine=frozen)", "full"],
)
def test_folded_network_has_the_layers_and_the_size_of_the_backbone(small_backbone, images, spec):
    patched = trained_task(small_backbone, spec)
    folded = fold(patched.model)
    unpatched = apply_patches(small_backbone, "none", classes=3, image_size=16).model
    plain = {"InputScaling": "Rescaling"}
    assert layer_classes(folded) == [plain.get(name, name) for name in layer_classes(unpatched)]
    assert folded.count_params() == unpatched.count_params()
    np.testing.assert_allclose(folded(images), patched.model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["scale_bias+depthwise", "depthwise+scale_bias"])
def test_kernel_and_scale_of_one_layer_fold_in_either_order(plain_backbone, images, order):
    """The scale applies to the output of the private kernel, whichever kind the spec names first."""
    patched = trained_task(plain_backbone, order)
    np.testing.assert_allclose(fold(patched.model)(images), patched.model(images), atol=1e-5)
    other = trained_task(plain_backbone, "+".join(reversed(order.split("+"))))
    for key, variable in other.private().items():
        variable.assign(patched.private()[key])
    np.testing.assert_allclose(other.model(images), patched.model(images), atol=1e-6)


def test_a_scale_folds_into_convolutions_and_adds_no_layer(plain_backbone, images):
    patched = trained_task(plain_backbone, "scale_bias")
    folded = fold(patched.model)
    assert "PatchedConvolution" not in layer_classes(folded)
    assert layer_classes(folded).count("Conv2D") == 2
    np.testing.assert_allclose(folded(images), patched.model(images), atol=1e-5)


def test_a_convolution_gets_a_bias_only_where_it_needs_one(images):
    image = keras.Input((None, None, 3))
    backbone = backbones.from_model(keras.Model(image, layers.Conv2D(4, 3, use_bias=False, name="stem")(image)))
    patched = apply_patches(backbone, "scale_bias", classes=3, image_size=16)
    patched.private()["stem/scale_bias/gamma"].assign([0.5, 2.0, -1.0, 0.0])
    stem = next(layer for layer in fold(patched.model)._flatten_layers() if layer.name == "stem")
    assert not stem.use_bias
    patched.private()["stem/scale_bias/beta"].assign([0.0, 0.0, 0.0, 1.0])
    folded = fold(patched.model)
    stem = next(layer for layer in folded._flatten_layers() if layer.name == "stem")
    np.testing.assert_array_equal(stem.bias, [0.0, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(folded(images), patched.model(images), atol=1e-3)


def test_depth_multiplier_and_channel_order(images):
    """The output channels of a depthwise convolution are input channel by input channel."""
    image = keras.Input((None, None, 3))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="spatial")(image)
    backbone = backbones.from_model(keras.Model(image, x), scaling="unit")
    patched = trained_task(backbone, "scale_bias")
    np.testing.assert_allclose(fold(patched.model)(images), patched.model(images), atol=1e-5)


def test_folding_writes_a_copy(small_backbone, images):
    patched = trained_task(small_backbone, "scale_bias+depthwise+head")
    before = [np.array(v) for v in patched.model.variables]
    structure = small_backbone.structure_hash(), small_backbone.fingerprint()
    folded = fold(patched.model)
    for variable in folded.variables:
        variable.assign(np.zeros(variable.shape))
    for variable, value in zip(patched.model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert (small_backbone.structure_hash(), small_backbone.fingerprint()) == structure
    assert any(isinstance(layer, PatchedLayer) for layer in patched.model._flatten_layers())


def test_a_folded_model_needs_no_k4p1_to_be_read(small_backbone, images, tmp_path):
    """All its layers are Keras' own."""
    folded = fold(trained_task(small_backbone, "scale_bias+depthwise+head").model)
    ours = {type(layer).__name__ for layer in folded._flatten_layers() if type(layer).__module__.startswith("k4p1")}
    assert ours == set()
    folded.save(tmp_path / "folded.keras")
    loaded = keras.saving.load_model(tmp_path / "folded.keras")
    np.testing.assert_allclose(loaded(images), folded(images), atol=1e-6)


def test_a_folded_model_can_be_trained(small_backbone, images):
    folded = fold(trained_task(small_backbone, "none").model)
    folded.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    before = np.array(folded.trainable_variables[0])
    folded.fit(images, np.arange(4) % 3, verbose=0)
    assert not np.array_equal(folded.trainable_variables[0], before)


def test_mobilenet_folds(mobilenet):
    patched = apply_patches(mobilenet, "scale_bias+depthwise+head", classes=4, image_size=32)
    random = np.random.default_rng(0)
    for key, variable in patched.private().items():
        if key.endswith(("gamma", "moving_variance")):
            variable.assign(random.uniform(0.8, 1.2, variable.shape))
    images = random.uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(fold(patched.model)(images), patched.model(images), atol=1e-5)


def test_a_kind_that_changes_the_output_must_say_how_it_folds():
    class Doubled(LayerPatch):
        def output(self, outputs):
            return 2 * outputs

    with pytest.raises(TypeError, match="Doubled cannot be folded"):
        Doubled().fold(np.zeros(1), np.zeros(1), None, {})
