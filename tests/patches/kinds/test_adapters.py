"""Residual adapters: equations, placement, rank, dropout, what they refuse (RA, section 3)."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from k4p1 import backbones, errors
from k4p1.patches import PatchSpec
from k4p1.patches.apply import apply_patches
from k4p1.patches.fold import fold
from k4p1.patches.kinds.parallel_adapter import CentreTap
from k4p1.patches.patched_layer import RANDOM
from k4p1.patches.patched_model import PRIVATE

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 11, 12, 3)).astype("float32")


def one_convolution(**options) -> backbones.Backbone:
    image = keras.Input((None, None, 3))
    layer = layers.Conv2D(4, **{"kernel_size": 3, "padding": "same", "name": "patched", **options})
    return backbones.from_model(keras.Model(image, layer(image)), name="one", scaling="none")


def features(backbone, spec, values, images=IMAGES, training=False):
    """Feature maps before pooling of the patched convolution, with private values given by the end of their key."""
    patched = apply_patches(backbone, spec, classes=2, image_size=images.shape[1:3], name="task")
    for key, variable in patched.private().items():
        name = key.rsplit("/", 1)[1]
        if name in values:
            variable.assign(values[name])
    network = next(layer for layer in patched.model.layers if hasattr(layer, "layers"))
    layer = next(layer for layer in network.layers if layer.name == "patched")
    return np.array(layer(images, training=training)), patched


@pytest.mark.parametrize("dropout", ["", ",dropout=0.3,dropout_block=all"])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (1, 1), (1, 2), (5, 1), (3, 2)])
def test_parallel_is_a_1x1_convolution_beside(size, stride, dropout):
    """RA, section 3.1.2; written with an explicit 1x1 convolution of what the centre tap sees."""
    backbone = one_convolution(kernel_size=size, strides=stride, padding="valid")
    alpha = np.random.default_rng(1).normal(size=(3, 4)).astype("float32")
    got, patched = features(backbone, f"parallel_adapter(init_std=1{dropout})", {"alpha": alpha})
    assert patched.private()["patched/parallel_adapter/alpha"].shape == (3, 4)
    crop = size // 2
    seen = IMAGES[:, crop : IMAGES.shape[1] - crop or None, crop : IMAGES.shape[2] - crop or None][:, ::stride, ::stride]
    layer = backbone.sites[0].layer
    expected = np.array(layer(IMAGES)) + (seen @ alpha)[:, : got.shape[1], : got.shape[2]]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_series_adds_a_mixture_of_the_normalised_output():
    """RA, section 3.1.1: y = h + alpha BN_a(h), at inference with BN_a's moving statistics."""
    random = np.random.default_rng(2)
    backbone = one_convolution()
    values = {"alpha": random.normal(size=(4, 4)), "bn_gamma": random.normal(size=4), "bn_beta": random.normal(size=4)}
    values |= {"moving_mean": random.normal(size=4), "moving_variance": random.uniform(0.5, 2.0, 4)}
    got, _ = features(backbone, "series_adapter", values)
    h = np.array(backbone.sites[0].layer(IMAGES))
    normalised = (h - values["moving_mean"]) / np.sqrt(values["moving_variance"] + 1e-5)
    expected = h + (values["bn_gamma"] * normalised + values["bn_beta"]) @ values["alpha"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-2)


def test_series_normalises_by_the_batch_in_training_and_moves_its_own_statistics():
    backbone = one_convolution()
    got, patched = features(backbone, "series_adapter(momentum=0.5)", {"alpha": np.eye(4)}, training=True)
    h = np.array(backbone.sites[0].layer(IMAGES))
    mean, variance = h.mean((0, 1, 2)), h.var((0, 1, 2))
    np.testing.assert_allclose(got, h + (h - mean) / np.sqrt(variance + 1e-5), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(patched.private()["patched/series_adapter/moving_mean"], 0.5 * mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(patched.private()["patched/series_adapter/moving_variance"], 0.5 + 0.5 * variance, rtol=1e-3)


@pytest.mark.parametrize("kind", ["series_adapter", "parallel_adapter"])
def test_folding_is_exact_to_1e_5_of_the_largest_output(kind):
    random = np.random.default_rng(3)
    backbone = backbones.cifar_resnet(depth=8)
    patched = apply_patches(backbone, f"{kind}+scale_bias+head", classes=5, image_size=16)
    for key, variable in patched.private().items():
        spread = np.abs(random.normal(1.0, 0.2, variable.shape))
        positive = key.endswith(("gamma", "variance"))
        variable.assign(spread if positive else random.normal(0.0, 0.3, variable.shape))
    images = random.integers(0, 256, (4, 16, 16, 3)).astype("float32")
    expected = np.array(patched.model(images))
    np.testing.assert_allclose(fold(patched.model)(images), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("kind", ["series_adapter", "parallel_adapter"])
def test_a_rank_factors_alpha(kind):
    backbone = backbones.cifar_resnet(depth=8)
    patched = apply_patches(backbone, f"{kind}(rank=3)", classes=2, image_size=16)
    shapes = {key: tuple(v.shape) for key, v in patched.private().items() if key.startswith("stage3_block1_conv1")}
    rows = 32 if kind == "parallel_adapter" else 64
    assert shapes[f"stage3_block1_conv1/{kind}/beta"] == (rows, 3)
    assert shapes[f"stage3_block1_conv1/{kind}/gamma"] == (64, 3)


def test_a_rank_above_the_channels_is_refused_by_name():
    with pytest.raises(errors.PatchError, match=r"rank=17.*'stem' has channels: 3 in, 16 out; expected at most 3"):
        apply_patches(backbones.cifar_resnet(depth=8), "parallel_adapter(rank=17)", classes=2, image_size=16)
    with pytest.raises(errors.PatchError, match=r"rank=20.*'stem' has channels"):
        apply_patches(backbones.cifar_resnet(depth=8), "lora(rank=20)", classes=2, image_size=16)


def owners(patched, kind):
    return {key.split("/")[0] for key in patched.private() if f"/{kind}/" in key}


@pytest.mark.parametrize("kind", ["series_adapter", "parallel_adapter"])
def test_placement_on_resnet26(kind):
    """RA, section 4.1: three stages of eight convolutions; "half" adapts the second of each block."""
    backbone = backbones.resnet26(width=0.1)
    everywhere = owners(apply_patches(backbone, kind, classes=2, image_size=32), kind)
    assert len(everywhere) == 25
    stages = {
        stage: owners(apply_patches(backbone, f"{kind}(stage={stage})", classes=2, image_size=32), kind)
        for stage in ("early", "mid", "late")
    }
    assert {stage: len(layers) for stage, layers in stages.items()} == {"early": 9, "mid": 8, "late": 8}
    assert all(name.startswith("stage3_") for name in stages["late"]) and "stem" in stages["early"]
    half = owners(apply_patches(backbone, f"{kind}(block=second)", classes=2, image_size=32), kind)
    assert half == {f"stage{s}_block{b}_conv2" for s in (1, 2, 3) for b in (1, 2, 3, 4)}


def test_projections_on_shortcuts_have_no_place_in_a_block():
    positions = {site.name: site.block_position for site in backbones.wide_resnet(depth=10, width=1).sites}
    assert positions["stage2_block1_conv1"] == 1 and positions["stage2_block1_conv2"] == 2
    assert positions["stage2_block1_shortcut"] is None and positions["stem"] is None


@pytest.mark.parametrize("kind", ["series_adapter", "parallel_adapter"])
def test_dropout_acts_in_training_only(kind):
    backbone = one_convolution()
    spec = f"{kind}(init_std=1,dropout=0.5,dropout_block=all)"
    alpha = np.random.default_rng(4).normal(size=(4, 4) if kind == "series_adapter" else (3, 4))
    with_dropout, patched = features(backbone, spec, {"alpha": alpha})
    without, _ = features(backbone, kind, {"alpha": alpha})
    np.testing.assert_allclose(with_dropout, without, rtol=1e-5, atol=1e-3)
    first, _ = features(backbone, spec, {"alpha": alpha}, training=True)
    plain, _ = features(backbone, kind, {"alpha": alpha}, training=True)
    assert np.abs(first - plain).max() > 1.0
    assert any(p.role == RANDOM for p in patched.parameters)


def test_dropout_is_before_the_second_adapter_of_a_block():
    patched = apply_patches(backbones.cifar_resnet(depth=8), "parallel_adapter(dropout=0.5)", classes=2, image_size=16)
    assert sum(p.role == RANDOM for p in patched.parameters) == 3


@pytest.mark.parametrize(
    ("layer", "kind", "reason"),
    [
        (layers.Conv2D(6, 3, groups=3, name="grouped"), "series_adapter", "grouped convolutions .'grouped'.*not fold"),
        (layers.Conv2D(6, 3, groups=3, name="grouped"), "parallel_adapter", "grouped convolutions"),
        (layers.DepthwiseConv2D(3, name="spatial"), "series_adapter", "DepthwiseConv2D"),
        (layers.DepthwiseConv2D(3, name="spatial"), "parallel_adapter", "DepthwiseConv2D"),
        (layers.DepthwiseConv2D(3, name="spatial"), "lora", "one filter per channel"),
        (layers.DepthwiseConv2D(3, name="spatial"), "dan", "DepthwiseConv2D"),
        (layers.Conv2D(6, 2, name="even"), "parallel_adapter", "even size, as of 'even'"),
        (layers.Conv2D(6, 3, name="alone"), "series_adapter(block=second)", "leave block=second out"),
    ],
)
def test_what_cannot_have_an_adapter_is_refused_with_the_reason(layer, kind, reason):
    image = keras.Input((None, None, 3))
    backbone = backbones.from_model(keras.Model(image, type(layer).from_config(layer.get_config())(image)), name="one")
    with pytest.raises(errors.PatchError, match=reason):
        apply_patches(backbone, kind, classes=2, image_size=16)


@pytest.mark.parametrize(
    "text",
    [
        "parallel_adapter(rank=-1)",
        "series_adapter(init_std=-1)",
        "parallel_adapter(dropout=1)",
        "series_adapter(block=third)",
    ],
)
def test_options_are_checked(text):
    with pytest.raises(errors.PatchError, match=text.split("=")[0].split("(")[1]):
        PatchSpec.parse(text)


def test_a_patch_larger_than_its_layer_draws_a_warning():
    backbone = one_convolution(kernel_size=1)
    with pytest.warns(errors.PatchWarning, match="'series_adapter' is larger than the layer .* in 1 layers"):
        apply_patches(backbone, "series_adapter", classes=2, image_size=16)


def test_random_alpha_changes_the_network_and_zero_does_not():
    backbone = backbones.cifar_resnet(depth=8)
    images = np.random.default_rng(5).integers(0, 256, (2, 16, 16, 3)).astype("float32")
    outputs = []
    for spec in ("head", "series_adapter+head", "series_adapter(init_std=0.1)+head"):
        outputs.append(np.array(apply_patches(backbone, spec, classes=3, image_size=16, seed=1).model(images)))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_lora_adds_a_low_rank_kernel():
    backbone = one_convolution()
    patched = apply_patches(backbone, "lora(rank=2,alpha=6)", classes=2, image_size=16)
    random = np.random.default_rng(6)
    down, up = random.normal(size=(3, 3, 3, 2)).astype("float32"), random.normal(size=(2, 4)).astype("float32")
    private = patched.private()
    private["patched/lora/down"].assign(down)
    private["patched/lora/up"].assign(up)
    network = next(layer for layer in fold(patched.model).layers if hasattr(layer, "layers"))
    kernel = next(layer for layer in network.layers if layer.name == "patched").kernel
    np.testing.assert_allclose(kernel, backbone.tensors()["patched/kernel"] + 3.0 * (down @ up), atol=1e-5)


def test_dan_combines_filters():
    backbone = one_convolution(use_bias=False)
    patched = apply_patches(backbone, "dan", classes=2, image_size=16)
    combination = np.random.default_rng(7).normal(size=(4, 4)).astype("float32")
    patched.private()["patched/dan/combination"].assign(combination)
    network = next(layer for layer in fold(patched.model).layers if hasattr(layer, "layers"))
    kernel = next(layer for layer in network.layers if layer.name == "patched").kernel
    np.testing.assert_allclose(kernel, backbone.tensors()["patched/kernel"] @ combination, atol=1e-5)
    assert sum(p.size for p in patched.parameters if p.owner == PRIVATE) == 16


def test_gradients_reach_what_an_adapter_owns():
    """Two steps move alpha and, once it is not zero, BN_a."""
    backbone = backbones.cifar_resnet(depth=8)
    patched = apply_patches(backbone, "series_adapter+head", classes=3, image_size=16)
    images = np.random.default_rng(8).integers(0, 256, (3, 16, 16, 3)).astype("float32")
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(patched.model(images, training=True) ** 2)
        values = [v.value for v in patched.model.trainable_variables]
        for variable, gradient in zip(patched.model.trainable_variables, tape.gradient(loss, values), strict=True):
            variable.assign_sub(0.1 * gradient)
    private = patched.private()
    assert np.abs(private["stage1_block1_conv1/series_adapter/alpha"]).max() > 0
    assert np.abs(np.array(private["stage1_block1_conv1/series_adapter/bn_gamma"]) - 1).max() > 0


@pytest.mark.parametrize("kind", ["series_adapter", "parallel_adapter"])
def test_a_random_start_has_the_deviation_of_the_authors(kind):
    """sqrt(2 / D), D output channels."""
    backbone = backbones.cifar_resnet(depth=8)
    patched = apply_patches(backbone, f"{kind}(init=he)+head", classes=2, image_size=16)
    alphas = {key.split("/")[0]: np.array(v) for key, v in patched.private().items() if key.endswith("/alpha")}
    assert len(alphas) == 7
    for name in ("stage1_block1_conv2", "stage2_block1_conv1", "stage3_block1_conv2"):
        assert alphas[name].std() == pytest.approx((2 / alphas[name].shape[1]) ** 0.5, rel=0.2)
    for refused in ("init=he,rank=2", "init=zero,init_std=0.1", "init=random"):
        with pytest.raises(errors.PatchError, match=f"{kind}.init="):
            apply_patches(backbone, f"{kind}({refused})+head", classes=2, image_size=16)


@pytest.mark.parametrize(("stored", "shared"), [(True, "beta"), (False, ""), ("gamma", "gamma")])
def test_models_saved_before_either_side_could_be_shared_say_true(stored, shared):
    adapter = CentreTap.from_config({"rank": 2, "joint": stored})
    assert adapter.joint == shared and CentreTap.from_config(adapter.get_config()).joint == shared
