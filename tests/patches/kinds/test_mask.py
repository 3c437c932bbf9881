"""Masks: forward and gradient, scores in float32, thresholds, bits on disk (PB, section 3)."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from k4p1 import backbones, errors
from k4p1.patches import PatchSpec
from k4p1.patches.apply import apply_patches
from k4p1.patches.bit_packing import BitPacking
from k4p1.patches.kinds.mask import WeightMask, sparsity
from k4p1.patches.patch_file import load_patch, save_patch


def bound(kernel, **options) -> WeightMask:
    """The mask of a dense layer with the given kernel."""
    layer = layers.Dense(kernel.shape[1], use_bias=False)
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    mask = WeightMask(**options)
    mask.bind(layer)
    return mask


KERNEL = np.array([[0.5, -1.0, 0.25], [2.0, -0.1, 0.0]], "float32")
SCORES = np.array([[0.01, 0.005, 0.0049], [-0.005, -0.2, 0.3]], "float32")


@pytest.mark.parametrize(("values", "expected"), [("binary", [[1, 1, 0], [0, 0, 1]]), ("ternary", [[1, 1, 0], [-1, -1, 1]])])
def test_a_weight_stays_where_its_score_reaches_the_threshold(values, expected):
    mask = bound(KERNEL, values=values)
    mask.scores.assign(SCORES)
    for training in (False, True):
        np.testing.assert_array_equal(mask.kernel(KERNEL, training), KERNEL * np.array(expected))


@pytest.mark.parametrize(("gradient", "scale"), [("plain", 1.0), ("scaled", 1.0 / np.abs(KERNEL).mean())])
def test_the_gradient_of_a_score_is_that_of_its_mask_value(gradient, scale):
    """PB, equation 7: dE/dm = (dE/d(m W)) . W, handed straight through the threshold; with SGD scaled by 1 / mean |W|."""
    mask = bound(KERNEL, gradient=gradient)
    mask.scores.assign(SCORES)
    outside = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "float32")
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(mask.kernel(KERNEL, True) * outside)
    np.testing.assert_allclose(tape.gradient(loss, mask.scores.value), outside * KERNEL * scale, rtol=1e-6)


def test_scores_from_weights_start_with_every_weight():
    mask = bound(KERNEL, scores="weights")
    np.testing.assert_allclose(mask.scores, np.abs(KERNEL) - np.abs(KERNEL).min(), atol=1e-7)
    np.testing.assert_array_equal(mask.kernel(KERNEL), KERNEL)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_scores_stay_float32_and_bits_do_not_flip(precision):
    """0.00500001 and 0.00499999 are one number in half precision."""
    keras.config.set_dtype_policy(precision)
    image = keras.Input((None, None, 3))
    backbone = backbones.from_model(keras.Model(image, layers.Conv2D(2, 1, name="c")(image)), name="one")
    patched = apply_patches(backbone, "mask", classes=2, image_size=8)
    scores = patched.private()["c/mask/scores"]
    assert scores.dtype == "float32"
    near = np.array([0.00500001, 0.00499999, 0.00500001, 0.00499999, 0.00500001, 0.00499999]).reshape(scores.shape)
    scores.assign(near)
    network = next(layer for layer in patched.model.layers if hasattr(layer, "layers"))
    layer = next(layer for layer in network.layers if layer.name == "c")
    probe = np.eye(3, dtype="float32")[None, :, None]
    got = np.array(layer(tf.cast(probe, layer.compute_dtype)), "float32") - np.array(backbone.tensors()["c/bias"])
    expected = backbone.tensors()["c/kernel"][0, 0] * (near >= 0.005).reshape(3, 2)
    np.testing.assert_allclose(got[0, :, 0], expected, rtol=1e-2, atol=1e-3)
    assert np.array_equal(got[0, :, 0] == 0, expected == 0)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_bits_come_back(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    packing = BitPacking(shape, data.draw(st.sampled_from([0.005, 0.1])), data.draw(st.booleans()))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scores = random.normal(0.0, 0.1, shape).astype("float32")
    packed = packing.encode(scores)
    assert packed.dtype == np.uint8 and packed.shape == packing.stored_shape
    np.testing.assert_array_equal(packing.encode(packing.decode(packed)), packed)
    again = packing.decode(packed)
    np.testing.assert_array_equal(again >= np.float32(packing.threshold), scores >= np.float32(packing.threshold))


def test_packing_has_a_fixed_layout():
    scores = np.array([1, 0, 0, 1, 1, 0, 0, 0, 1], "float32")
    np.testing.assert_array_equal(BitPacking((9,), 0.5).encode(scores), [0b00011001, 1])
    ternary = BitPacking((5,), 0.5, ternary=True)
    np.testing.assert_array_equal(ternary.encode(np.array([1, 0, -1, 1, -1], "float32")), [0b01100001, 0b10])


@pytest.mark.parametrize(
    ("packing", "bad", "message"),
    [
        (BitPacking((9,), 0.5), np.zeros(1, np.uint8), r"takes uint8 \(2,\)"),
        (BitPacking((9,), 0.5), np.zeros(2, np.float32), "got float32"),
        (BitPacking((4,), 0.5, True), np.array([0b11], np.uint8), "code 3"),
    ],
)
def test_bits_that_stand_for_nothing_are_refused(packing, bad, message):
    with pytest.raises(errors.ArtifactError, match=message):
        packing.decode(bad)


@pytest.mark.parametrize(("values", "bits"), [("binary", 1), ("ternary", 2)])
def test_a_patch_file_holds_a_bit_a_weight(tmp_path, values, bits):
    """n/8 bytes, head and header within 1%; no scores."""
    backbone = backbones.wide_resnet(depth=10, width=4)
    patched = apply_patches(backbone, f"mask(mask_type={values})+head", classes=10, image_size=16)
    random = np.random.default_rng(0)
    masked = [p for p in patched.owned() if p.storage is not None]
    for parameter in masked:
        parameter.variable.assign(random.normal(0.0, 0.01, parameter.variable.shape))
    path = tmp_path / "patch.safetensors"
    save_patch(path, patched, backbone, task="t", labels=[str(i) for i in range(10)])
    with open(path, "rb") as f:
        header = 8 + int.from_bytes(f.read(8), "little")
    weights = sum(p.size for p in masked)
    assert weights > 1_000_000
    head = 4 * (backbone.features + 1) * 10
    assert path.stat().st_size == pytest.approx(weights * bits / 8 + head + header, rel=0.01)
    assert header < 0.05 * weights / 8
    images = random.integers(0, 256, (2, 16, 16, 3)).astype("float32")
    np.testing.assert_array_equal(load_patch(path, backbone).model(images), patched.model(images))


def test_mask_and_private_kernels_do_not_share_a_layer(small_backbone):
    with pytest.raises(errors.PatchError, match="'full' already makes every parameter private; take 'mask' out"):
        apply_patches(small_backbone, "mask+full", classes=2, image_size=16)
    with pytest.raises(errors.PatchError, match=r"'mask' and 'full' cannot share layer 'stem'.*separate them by layers="):
        apply_patches(small_backbone, "mask+full(layers=stem)", classes=2, image_size=16)
    with pytest.raises(errors.PatchError, match="'mask' and 'depthwise' cannot share layer 'spatial'"):
        apply_patches(small_backbone, "mask+depthwise", classes=2, image_size=16)
    apart = apply_patches(small_backbone, "mask(layers=stem)+full(layers=mix)", classes=2, image_size=16)
    assert {key.rsplit("/", 1)[0] for key in apart.private()} >= {"stem/mask", "mix/full"}


def test_a_layer_without_any_weight_is_named(small_backbone):
    with pytest.warns(errors.PatchWarning, match="removes every weight of 3 layers .first: 'stem'.; nothing passes them"):
        apply_patches(small_backbone, "mask(init_score=0.001)", classes=2, image_size=16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask(mask_type=quaternary)", "Allowed: binary, ternary"),
        ("mask(mask_type=ternary,scores=weights)", "scores=constant"),
        ("mask(mask_type=ternary,threshold=0)", "positive threshold"),
        ("mask(treshold=0.1)", "did you mean 'threshold'"),
        ("mask(gradient=none)", "Allowed: plain, scaled"),
    ],
)
def test_options_are_checked(small_backbone, text, message):
    with pytest.raises(errors.PatchError, match=message):
        apply_patches(small_backbone, text, classes=2, image_size=16)


def test_sparsity_counts_by_layer(small_backbone):
    patched = apply_patches(small_backbone, "mask(mask_type=ternary)", classes=2, image_size=16)
    scores = np.full((1, 1, 6, 8), 0.01, "float32")
    scores[..., :3] = 0.0
    scores[..., 3:5] = -0.01
    patched.private()["mix/mask/scores"].assign(scores)
    found = {layer.layer: layer for layer in sparsity(patched)}
    assert list(found) == ["stem", "spatial", "mix"]
    assert (found["mix"].weights, found["mix"].zeros, found["mix"].negated) == (48, 18, 12)
    assert found["stem"].zeros == 0


@pytest.mark.parametrize("threshold", [1e6, -1e6, 3e-4, 1e30, 0.0])
@pytest.mark.parametrize("ternary", [False, True])
def test_bits_survive_decoding_at_any_threshold(threshold, ternary):
    if ternary and threshold <= 0:
        threshold = 1.0
    packing = BitPacking((3, 5), threshold, ternary)
    steps = np.random.default_rng(0).integers(-1 if ternary else 0, 2, (3, 5))
    scores = (2 * threshold * steps if ternary else np.where(steps, np.inf, -np.inf)).astype("float32")
    bits = packing.encode(scores)
    np.testing.assert_array_equal(packing.encode(packing.decode(bits)), bits)
    assert np.isfinite(packing.decode(bits)).all()


@pytest.mark.parametrize("option", ["threshold", "init_score"])
def test_thresholds_beyond_float32_are_refused(option):
    with pytest.raises(errors.PatchError, match=rf"mask\({option}=1e\+?39\): expected at most"):
        PatchSpec.parse(f"mask({option}=1e39)")


def test_a_kernel_of_zeros_has_a_finite_gradient():
    kernel = np.zeros((2, 3), "float32")
    mask = bound(kernel, gradient="scaled")
    with tf.GradientTape() as tape:
        masked = mask.kernel(kernel, True)
        loss = tf.reduce_sum(masked)
    np.testing.assert_array_equal(masked, kernel)
    np.testing.assert_array_equal(tape.gradient(loss, mask.scores.value), kernel)
