"""The conformance table: every patch kind x every layer shape x every invariant, generated.

A cell that cannot apply (a depthwise patch on a dense layer, say) must be refused; `applies` says which cells these are.
"""

import collections
import functools
import itertools
import warnings
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from k4p1 import backbones, errors
from k4p1.patches import PatchSpec
from k4p1.patches.apply import apply_patches
from k4p1.patches.costs import multiply_adds
from k4p1.patches.fold import fold
from k4p1.patches.patch_file import load_patch, save_head, save_patch
from k4p1.patches.patched_layer import FIXED, RANDOM, STATISTICS, TRAINED, PatchedLayer
from k4p1.patches.patched_model import PRIVATE, SHARED

SHAPES = {
    "conv_3x3": lambda bias: layers.Conv2D(6, 3, padding="same", use_bias=bias, name="patched"),
    "conv_1x1": lambda bias: layers.Conv2D(6, 1, use_bias=bias, name="patched"),
    "conv_strided": lambda bias: layers.Conv2D(6, 3, strides=2, use_bias=bias, name="patched"),
    "conv_dilated": lambda bias: layers.Conv2D(6, 3, dilation_rate=2, padding="same", use_bias=bias, name="patched"),
    "conv_grouped": lambda bias: layers.Conv2D(6, 3, groups=3, padding="same", use_bias=bias, name="patched"),
    "conv_fused_relu": lambda bias: layers.Conv2D(6, 3, activation="relu", use_bias=bias, name="patched"),
    "depthwise": lambda bias: layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", use_bias=bias, name="patched"),
    "depthwise_strided_relu": lambda bias: layers.DepthwiseConv2D(
        3, strides=2, activation="relu", use_bias=bias, name="patched"
    ),
    "separable": lambda bias: layers.SeparableConv2D(6, 3, depth_multiplier=2, use_bias=bias, name="patched"),
    "dense": lambda bias: layers.Dense(6, activation="tanh", use_bias=bias, name="patched"),
}
NORMALISATIONS = {
    "none": lambda: None,
    "batch_norm": lambda: layers.BatchNormalization(momentum=0.9, name="norm"),
    "batch_norm_without_gamma": lambda: layers.BatchNormalization(scale=False, epsilon=1e-2, name="norm"),
    "layer_norm": lambda: layers.LayerNormalization(name="norm"),
    "layer_norm_without_gamma": lambda: layers.LayerNormalization(scale=False, epsilon=1e-2, name="norm"),
    "group_norm": lambda: layers.GroupNormalization(groups=3, name="norm"),
    "group_norm_without_beta": lambda: layers.GroupNormalization(groups=2, center=False, name="norm"),
    "rms_norm": lambda: layers.RMSNormalization(name="norm"),
}
OF_AN_IMAGE = [name for name in NORMALISATIONS if name.startswith(("layer", "group", "rms"))]
"""Normalisations that have no statistics of batches."""
VARIANTS = [("none", True), ("none", False), ("batch_norm", False), ("batch_norm_without_gamma", True)]
LAYER_SPECS = [
    "scale_bias",
    "scale_bias(statistics=frozen)",
    "scale_bias(affine=frozen)",
    "scale_bias(affine=scale)",
    "scale_bias(affine=bias)",
    "scale_bias(where=every)",
    "depthwise",
    "full",
    "series_adapter",
    "series_adapter(rank=2)",
    "parallel_adapter",
    "parallel_adapter(rank=2,dropout=0.5,dropout_block=all)",
    "mask",
    "mask(mask_type=ternary)",
    "mask(scores=weights,gradient=scaled)",
    "lora(rank=2)",
    "dan",
    "scale_bias+depthwise+head",
    "depthwise+scale_bias(statistics=frozen)",
    "mask+scale_bias+head",
    "parallel_adapter+scale_bias+head",
    "scale_bias+series_adapter+mask",
    "lora(rank=1)+parallel_adapter+scale_bias(statistics=frozen)+dan",
]
HEAD_SPECS = ["none", "head", "head(mode=random)", "head(mode=shared)", "full+head(mode=random)"]
CELLS = [
    *itertools.product(LAYER_SPECS, [shape for shape in SHAPES if shape != "conv_grouped"], VARIANTS),
    *itertools.product(LAYER_SPECS, ["conv_grouped"], VARIANTS[1:3]),  # compiled by XLA at each call: slow
    *itertools.product(
        [spec for spec in LAYER_SPECS if spec.startswith("scale_bias")] + ["full", "mask+scale_bias+head"],
        ["conv_3x3", "dense"],
        [(name, False) for name in OF_AN_IMAGE],
    ),
    *itertools.product(HEAD_SPECS, ["conv_3x3", "depthwise", "dense"], [("batch_norm", True)]),
]
LABELS = ("cat", "dog", "owl")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3)).astype("float32")
CLASSES = np.arange(4) % 3


def applies(spec: str, shape: str, normalisation: str) -> bool:
    """Whether every kind of the spec has something to patch in a network of this one layer."""
    kinds = PatchSpec.parse(spec)
    is_depthwise = shape.startswith("depthwise") or shape == "separable"
    is_convolution = shape.startswith("conv") and shape != "conv_grouped"
    if kinds.get("depthwise") and not is_depthwise:
        return False
    if any(kinds.get(name) for name in ("series_adapter", "parallel_adapter", "dan")) and not is_convolution:
        return False
    if kinds.get("lora") and is_depthwise:
        return False
    if kinds.get("mask") and shape == "separable":
        return False
    if kinds.get("scale_bias") and (normalisation == "none" or normalisation in OF_AN_IMAGE):
        affine = kinds.get("scale_bias").affine
        return affine != "frozen" and not (affine == "bias" and normalisation == "rms_norm")
    return True


def cell_id(cell) -> str:
    spec, shape, (normalisation, bias) = cell
    return f"{spec}-{shape}-{normalisation}-{'bias' if bias else 'no_bias'}"


@functools.cache
def network(shape: str, normalisation: str, bias: bool, seed: int = 0) -> backbones.Backbone:
    """A backbone of one layer, with values away from the initial ones."""
    image = keras.Input((None, None, 3))
    x = SHAPES[shape](bias)(image)
    norm = NORMALISATIONS[normalisation]()
    x = layers.LeakyReLU(0.3, name="relu")(x if norm is None else norm(x))
    model = keras.Model(image, layers.GlobalAveragePooling2D(name="pool")(x), name="one_layer")
    random = np.random.default_rng([seed, zlib.crc32(shape.encode())])
    for variable in model.variables:
        values = random.normal(0.0, 0.5, variable.shape)
        variable.assign(0.5 + np.abs(values) if variable.name in ("gamma", "moving_variance") else values)
    return backbones.from_model(model, name="one_layer", scaling="symmetric")


def values(model: keras.Model) -> list[np.ndarray]:
    return [np.array(variable) for variable in model.variables]


def train(model: keras.Model, steps: int = 2, rate: float = 0.2) -> None:
    """Gradient steps on what the model says is trainable, as `fit` does."""
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(CLASSES, model(IMAGES, training=True), True))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            variable.assign_sub(rate * gradient)


class Trained:
    """A task model of a cell, what it was when it was built, and what it is after some training."""

    def __init__(self, spec, shape, variant, folder):
        self.spec, self.normalisation = PatchSpec.parse(spec), variant[0]
        self.backbone = network(shape, *variant)
        self.other_backbone = network(shape, *variant, seed=1)
        self.shared_before = self.backbone.tensors()
        with warnings.catch_warnings():  # some patches are larger than these small layers, and say so
            warnings.simplefilter("ignore", errors.PatchWarning)
            self.patched = apply_patches(self.backbone, spec, classes=len(LABELS), image_size=9, seed=5)
        self.before = {p.key: np.array(p.variable) for p in self.patched.parameters}
        self.initial_output = np.array(self.patched.model(IMAGES))
        train(self.patched.model)
        self.after = {p.key: np.array(p.variable) for p in self.patched.parameters}
        self.output = np.array(self.patched.model(IMAGES))
        self.patch_file, self.heads = folder / "patch.safetensors", folder / "heads"
        save_patch(self.patch_file, self.patched, self.backbone, task="t", labels=LABELS)
        if self.spec.shares_head:
            save_head(self.heads, self.patched, LABELS)


def read(cell: Trained, backbone: backbones.Backbone):
    """The task model of the cell's patch file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.PatchWarning)
        return load_patch(cell.patch_file, backbone, heads=cell.heads)


def covering(cells):
    """Two shapes of every spec, and one cell of every shape and variant: what finds most of what the whole table finds."""
    shapes_of, seen, chosen = collections.Counter(), set(), set()
    for spec, shape, variant in sorted(cells, key=lambda cell: zlib.crc32(cell_id(cell).encode())):
        if (
            (shapes_of[spec] < 2 and (spec, shape) not in seen)
            or shape not in seen
            or (variant, shape.split("_")[0]) not in seen
        ):
            shapes_of[spec] += (spec, shape) not in seen
            seen |= {shape, (spec, shape), (variant, shape.split("_")[0])}
            chosen.add((spec, shape, variant))
    return chosen


APPLIED = [c for c in CELLS if applies(c[0], c[1], c[2][0])]
REFUSED = [c for c in CELLS if not applies(c[0], c[1], c[2][0])]
COVERING = covering(APPLIED) | set(REFUSED[::20])


def marked(cells):
    return [pytest.param(c, id=cell_id(c), marks=() if c in COVERING else pytest.mark.full_table) for c in cells]


@pytest.fixture(scope="module", params=marked(APPLIED))
def cell(request, tmp_path_factory) -> Trained:
    return Trained(*request.param, tmp_path_factory.mktemp("cell"))


def test_is_the_backbone_and_its_head_at_initialisation(cell):
    features = np.array(cell.backbone.model(IMAGES / 127.5 - 1.0))
    kernel, bias = (next(v for key, v in cell.before.items() if key.endswith(name)) for name in ("head/kernel", "head/bias"))
    np.testing.assert_allclose(cell.initial_output, features @ kernel + bias, atol=1e-5, rtol=1e-5)


def test_only_private_parameters_move(cell):
    has_batch_normalisation = (
        any("norm/" in p.key for p in cell.patched.parameters) and cell.normalisation not in OF_AN_IMAGE
    )
    moved = {key for key in cell.before if not np.array_equal(cell.before[key], cell.after[key])}
    may_move = {p.key for p in cell.patched.parameters if p.owner == PRIVATE and p.role in (TRAINED, STATISTICS)}
    seeds = {p.key for p in cell.patched.parameters if p.role == RANDOM}
    assert moved <= may_move | seeds
    # What adds a constant in front of a batch normalisation has no gradient; everything else must have moved.
    constants = ("patched/full/bias", "patched/series_adapter/bn_beta", "patched/dan/bias_change")
    assert {key for key in may_move if not (has_batch_normalisation and key.startswith(constants))} <= moved


def test_shared_parameters_and_frozen_statistics_are_bit_equal_after_training(cell):
    for key, value in cell.backbone.tensors().items():
        np.testing.assert_array_equal(value, cell.shared_before[key], err_msg=key)


def test_every_variable_is_listed_once_and_has_one_owner(cell):
    listed = [id(p.variable) for p in cell.patched.parameters]
    assert sorted(listed) == sorted(id(v) for v in cell.patched.model.variables)
    shared = {id(v) for v in cell.backbone.model.variables}
    if cell.spec.shares_head:
        shared |= {id(v) for v in cell.patched.head.variables}
    for parameter in cell.patched.parameters:
        assert (parameter.owner == SHARED) == (id(parameter.variable) in shared), parameter.key


def test_the_trainable_variables_are_the_private_trained_ones(cell):
    trained = {id(p.variable) for p in cell.patched.parameters if p.owner == PRIVATE and p.role == TRAINED}
    assert {id(v) for v in cell.patched.model.trainable_variables} == trained


def test_the_head_has_the_role_that_the_spec_gives_it(cell):
    head = cell.spec.get("head")
    is_fixed = head.mode != "trained" if head else cell.spec.shares_head
    roles = {p.role for p in cell.patched.parameters if p.key.startswith("head/")}
    assert roles == {FIXED if is_fixed else TRAINED}


def test_a_saved_patch_gives_the_same_output_when_loaded(cell):
    loaded = read(cell, cell.backbone)
    assert loaded.spec == cell.spec
    assert loaded.private().keys() == cell.patched.private().keys()
    np.testing.assert_array_equal(loaded.model(IMAGES), cell.output)


def test_folded_model_computes_the_same_without_patched_layers(cell):
    before = values(cell.patched.model)
    folded = fold(cell.patched.model)
    scale = max(1.0, np.abs(cell.output).max())
    np.testing.assert_allclose(folded(IMAGES), cell.output, atol=1e-5 * scale, rtol=0)
    assert not any(isinstance(layer, PatchedLayer) for layer in folded._flatten_layers())
    assert multiply_adds(folded) == multiply_adds(cell.patched.model, patches=False)
    assert {id(v) for v in folded.variables}.isdisjoint(id(v) for v in cell.patched.model.variables)
    for mine, theirs in zip(values(cell.patched.model), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_another_backbone_refuses_the_patch_and_stays_as_it_was(cell):
    other = cell.other_backbone
    before = values(other.model), [v.trainable for v in other.model.variables], other.fingerprint()
    with pytest.raises(errors.ArtifactError, match="for a 'one_layer' with other weights: its fingerprint is"):
        read(cell, other)
    after = values(other.model), [v.trainable for v in other.model.variables], other.fingerprint()
    assert before[1:] == after[1:]
    for mine, theirs in zip(after[0], before[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("refused", marked(REFUSED))
def test_a_cell_that_cannot_apply_is_refused(refused):
    spec, shape, variant = refused
    backbone = network(shape, *variant, seed=2)
    backbone.set_trainable(True)
    before = values(backbone.model), [v.trainable for v in backbone.model.variables]
    with pytest.raises(errors.PatchError, match="touches nothing in this network: "):
        apply_patches(backbone, spec, classes=3, image_size=9)
    assert [v.trainable for v in backbone.model.variables] == before[1]
    for mine, theirs in zip(values(backbone.model), before[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_table_has_both_kinds_of_cells():
    for cells in (APPLIED, COVERING & set(APPLIED)):
        assert {c[0] for c in cells} == {*LAYER_SPECS, *HEAD_SPECS}
        assert {c[1] for c in cells} == set(SHAPES)
    assert len(COVERING) < len(APPLIED) / 4 and REFUSED
