"""What applying a patch does to memory, to the backbone, and to the modes of batch normalisation."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers

from k4p1 import backbones, errors
from k4p1.patches.apply import apply_patches
from k4p1.patches.fold import fold
from k4p1.patches.patched_layer import FIXED, RANDOM, STATISTICS, TRAINED
from k4p1.patches.patched_model import PRIVATE, SHARED


def build(backbone, spec, **options):
    return apply_patches(backbone, spec, **{"classes": 3, "image_size": 16, **options})


def fit(model, images, epochs=2):
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, np.arange(len(images)) % 3, epochs=epochs, batch_size=2, verbose=0)


def nodes(model):
    """How many graph nodes every operation of a model has, inner models included."""
    counted = []
    for operation in model.operations:
        counted.append((operation.name, len(operation._inbound_nodes), len(operation._outbound_nodes)))
        if hasattr(operation, "operations"):
            counted += nodes(operation)
    return counted


def with_inner_models() -> keras.Model:
    """A functional model that holds a functional model, a sequential one, a `+`, and a layer that it calls twice."""
    keras.utils.set_random_seed(3)
    inner_input = keras.Input((None, None, 4))
    x = layers.DepthwiseConv2D(3, padding="same", name="spatial")(inner_input)
    inner = keras.Model(inner_input, layers.BatchNormalization(name="norm")(x), name="inner")
    stack = keras.Sequential([layers.Conv2D(4, 1, name="mix"), layers.BatchNormalization(name="norm")], name="stack")
    twice = layers.Conv2D(4, 3, padding="same", name="twice")
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(image)
    x = x + stack(inner(x))
    return keras.Model(image, layers.GlobalAveragePooling2D(name="pool")(twice(twice(x))), name="outer")


@pytest.fixture
def nested():
    return backbones.from_model(with_inner_models(), name="nested", scaling="symmetric")


# A task model that goes away


@pytest.mark.parametrize(
    ("spec", "used"),
    [
        ("none", False),
        ("full", False),
        ("scale_bias+depthwise+head", False),
        ("scale_bias+depthwise+head", True),
        ("head(mode=shared)", False),
    ],
)
@pytest.mark.slow
def test_a_deleted_task_is_freed(nested, images, spec, used):
    before = nodes(nested.model)
    patched = build(nested, spec, shared_trained=used)
    if used:
        fit(patched.model, images, epochs=1)
        fold(patched.model)
    watched = [weakref.ref(patched.model), *(weakref.ref(layer) for layer in patched.model._flatten_layers())]
    del patched
    gc.collect()
    keras.backend.clear_session(free_memory=True)
    assert [reference() for reference in watched if reference() is not None] == []
    assert nodes(nested.model) == before


def test_the_backbone_gains_no_nodes_while_a_task_lives(small_backbone):
    before = nodes(small_backbone.model)
    tasks = [build(small_backbone, spec) for spec in ("scale_bias+head", "depthwise+head", "full", "none")]
    assert nodes(small_backbone.model) == before
    assert len(tasks) == 4


def test_a_task_that_shares_its_head_does_not_keep_the_first_task_alive(small_backbone):
    first = build(small_backbone, "head(mode=shared)")
    second = build(small_backbone, "scale_bias+head(mode=shared)", shared_head=first.head)
    model = weakref.ref(first.model)
    assert second.head.kernel is first.head.kernel
    del first
    gc.collect()
    assert model() is None


# What is patched


def test_replaced_variables_are_not_part_of_the_task_model(small_backbone):
    """Every variable of the model is used: statistics, scales and kernels that a patch replaces are not there."""
    patched = build(small_backbone, "scale_bias+depthwise+head")
    used = {id(v) for v in patched.model.variables}
    for key, variable in small_backbone.variables().items():
        assert (id(variable) in used) == (key in {"stem/kernel", "mix/kernel"}), key
    assert len(patched.model.variables) == len(used) == 2 + 3 * 4 + 1 + 2


def test_inner_models_and_repeated_layers_are_patched(nested, images):
    patched = build(nested, "scale_bias+depthwise+head")
    assert set(patched.private()) == {
        *(f"{inner}/norm/scale_bias/{name}" for inner in ("inner", "stack") for name in _BATCH_NORMALISATION),
        "inner/spatial/depthwise/kernel",
        "head/head/kernel",
        "head/head/bias",
    }
    reference = np.array(build(nested, "none").model(images))
    np.testing.assert_allclose(patched.model(images), reference, atol=1e-6)
    patched.private()["inner/norm/scale_bias/beta"].assign([1.0, -1.0, 2.0, 0.5])
    assert np.abs(np.array(patched.model(images)) - reference).max() > 1e-3
    np.testing.assert_allclose(fold(patched.model)(images), patched.model(images), atol=1e-5)


_BATCH_NORMALISATION = ("gamma", "beta", "moving_mean", "moving_variance")


def test_a_layer_that_is_called_twice_has_one_patch(images):
    model = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(3, 3, padding="same", name="twice")])
    twice = model.layers[0]
    image = keras.Input((None, None, 3))
    backbone = backbones.from_model(keras.Model(image, twice(twice(image))), scaling="symmetric")
    patched = build(backbone, "scale_bias")
    assert list(patched.private()) == ["twice/scale_bias/gamma", "twice/scale_bias/beta"]
    plain = np.array(patched.model(images))
    patched.private()["twice/scale_bias/gamma"].assign([2.0, 2.0, 2.0])
    head = patched.head
    features = np.array(backbone.model(images / 127.5 - 1.0))
    np.testing.assert_allclose(plain, features @ head.kernel, atol=1e-5)
    np.testing.assert_allclose(patched.model(images), 4.0 * plain, atol=1e-4)  # no bias: twice two is four


def patched_layers(patched):
    return sorted({p.key.split("/")[0] for p in patched.parameters if p.owner == PRIVATE})


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("scale_bias", ["mix_bn", "spatial_bn", "stem_bn"]),
        ("scale_bias(stage=early)", ["stem_bn"]),
        ("scale_bias(stage=mid)", ["spatial_bn"]),
        ("scale_bias(stage=late)", ["mix_bn"]),
        ("scale_bias(layers=s*)", ["spatial_bn", "stem_bn"]),
        ("scale_bias(layers=mix_bn|stem_*)", ["mix_bn", "stem_bn"]),
        ("scale_bias(layers=s*,stage=early)", ["stem_bn"]),
        ("depthwise(stage=mid)", ["spatial"]),
        ("full(layers=*_bn)+head", ["head", "mix_bn", "spatial_bn", "stem_bn"]),
        ("full(stage=late)", ["head", "mix", "mix_bn"]),
        ("scale_bias(layers=stem_bn)+depthwise+head", ["head", "spatial", "stem_bn"]),
    ],
)
def test_restrictions_by_name_and_depth(small_backbone, spec, names):
    assert patched_layers(build(small_backbone, spec)) == names


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("depthwise(stage=late)", "none of its 1 fitting layers matches layers=\\*, stage=late"),
        ("scale_bias(layers=block_*)", "none of its 3 fitting layers matches layers=block_\\*, stage=all"),
        ("head+full(layers=nothing)", "patch 'full' touches nothing in this network: none of its 6 fitting"),
    ],
)
def test_a_patch_that_touches_nothing_is_refused(small_backbone, spec, why):
    with pytest.raises(errors.PatchError, match=why):
        build(small_backbone, spec)


def test_refusals_say_what_the_network_lacks(plain_backbone):
    with pytest.raises(errors.PatchError, match="no batch normalisation whose statistics could be private"):
        build(plain_backbone, "scale_bias(affine=frozen)")
    image = keras.Input((None, None, 3))
    dense = backbones.from_model(keras.Model(image, layers.Dense(4)(image)))
    activation = backbones.from_model(keras.Model(image, layers.PReLU(shared_axes=[1, 2])(image)))
    with pytest.raises(errors.PatchError, match="it has neither normalisation nor convolutions nor dense layers"):
        build(activation, "scale_bias")
    with pytest.raises(errors.PatchError, match="patch 'depthwise' touches nothing in this network: it has no depthwise"):
        build(dense, "depthwise")


def test_a_convolution_of_an_unknown_class_is_refused():
    @keras.saving.register_keras_serializable("tests")
    class GatedConvolution(layers.Conv2D):
        def call(self, inputs):
            return keras.ops.sigmoid(super().call(inputs))

    image = keras.Input((None, None, 3))
    backbone = backbones.from_model(keras.Model(image, GatedConvolution(4, 3, name="gated")(image)))
    with pytest.raises(errors.PatchError, match="GatedConvolution 'gated' cannot be patched; allowed: Conv1D, Conv2D"):
        build(backbone, "scale_bias")


def test_a_refused_task_leaves_the_backbone_trainable_as_it_was():
    image = keras.Input((None, None, 3))
    backbone = backbones.from_model(keras.Model(image, layers.Conv2D(4, 7, name="stem")(image)), name="mine")
    backbone.set_trainable(True)
    for spec, size in (("depthwise", 16), ("head", 6)):
        with pytest.raises(errors.ConfigError):
            build(backbone, spec, image_size=size)
    assert [v.trainable for v in backbone.model.variables] == [True, True]


# Image sizes


@pytest.mark.parametrize("size", [74, (74, 96), (96, 74)])
def test_an_image_too_small_for_the_network_is_refused(inception, size):
    with pytest.raises(errors.ConfigError, match="is too small for InceptionV3: at least 75 pixels per side"):
        build(inception, "head", image_size=size)


def test_an_image_too_small_for_a_model_of_ones_own_is_refused():
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 7, name="a")(layers.Conv2D(4, 7, name="b")(image))
    backbone = backbones.from_model(keras.Model(image, x), name="mine")
    with pytest.raises(errors.ConfigError, match="mine does not work at image size 8x8: ") as caught:
        build(backbone, "head", image_size=8)
    assert "\n" not in str(caught.value)


def test_tasks_of_different_image_sizes_share_one_backbone(small_backbone):
    square, wide = build(small_backbone, "head", image_size=16), build(small_backbone, "head", image_size=(20, 28))
    assert square.model.input_shape == (None, 16, 16, 3)
    assert wide.model.input_shape == (None, 20, 28, 3)
    assert wide.image_size == (20, 28)
    assert wide.model(np.zeros((2, 20, 28, 3), "float32")).shape == (2, 3)


# Plain Keras


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("nested", "none"),
        ("nested", "scale_bias+depthwise+head"),
        ("nested", "scale_bias(affine=frozen)+head(mode=random)"),
        ("nested", "full"),
        ("plain_backbone", "scale_bias(statistics=frozen)+depthwise+head"),
    ],
)
def test_a_task_model_is_saved_and_loaded_by_keras(request, images, tmp_path, kind, spec):
    backbone = request.getfixturevalue(kind)
    model = build(backbone, spec, seed=2).model
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign_add(random.uniform(-0.2, 0.2, variable.shape))
    expected = np.array(model(images))
    model.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    np.testing.assert_allclose(loaded(images), expected, atol=1e-5)
    assert [v.shape for v in loaded.variables] == [v.shape for v in model.variables]
    trainable = [[(v.name, v.shape) for v in m.trainable_variables] for m in (loaded, model)]
    assert trainable[0] == trainable[1]
    loaded.summary(print_fn=lambda *_, **__: None)


@pytest.mark.parametrize("spec", ["scale_bias(statistics=frozen)+depthwise+head", "full"])
@pytest.mark.slow
def test_plain_fit_learns_with_the_patch_alone(small_backbone, spec):
    random = np.random.default_rng(0)
    classes = np.arange(24) % 3
    images = random.uniform(0, 60, (24, 16, 16, 3)).astype("float32")
    images[np.arange(24), :, :, classes] += 150
    before = small_backbone.tensors()
    model = build(small_backbone, spec).model
    model.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(images, classes, epochs=8, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.95 * losses[0]
    for key, value in small_backbone.tensors().items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


def test_equal_seeds_give_equal_heads(small_backbone):
    kernels = [np.array(build(small_backbone, "head", seed=seed).head.kernel) for seed in (4, 4, 5)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_dropout_acts_in_training_only_and_its_seed_is_no_parameter(small_backbone, images):
    patched = build(small_backbone, "head", dropout=0.5)
    training = [np.array(patched.model(images, training=True)) for _ in range(2)]
    assert not np.array_equal(*training)
    np.testing.assert_array_equal(patched.model(images), patched.model(images))
    assert [p.kind for p in patched.parameters if p.role == RANDOM] == ["random"]
    assert list(patched.private()) == ["head/head/kernel", "head/head/bias"]


# The modes of batch normalisation


@pytest.mark.parametrize("spec", ["none", "head", "depthwise", "scale_bias(statistics=frozen)+head"])
def test_frozen_statistics_are_used_in_training_too(small_backbone, images, spec):
    model = build(small_backbone, spec).model
    before = small_backbone.tensors()
    np.testing.assert_array_equal(model(images, training=True), model(images, training=False))
    for key, value in small_backbone.tensors().items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


@pytest.mark.parametrize("spec", ["scale_bias", "scale_bias(affine=frozen)", "full"])
def test_private_statistics_follow_training(small_backbone, images, spec):
    patched = build(small_backbone, spec)
    statistics = {p.key: p.variable for p in patched.parameters if p.role == STATISTICS}
    before = {key: np.array(v) for key, v in statistics.items()}
    at_inference = np.array(patched.model(images, training=False))
    assert all(np.array_equal(v, before[key]) for key, v in statistics.items())
    in_training = np.array(patched.model(images, training=True))
    assert np.abs(in_training - at_inference).max() > 1e-3
    assert not any(np.array_equal(v, before[key]) for key, v in statistics.items())
    assert set(statistics) == patched.recalibrated == set(patched.statistics_momentum)


def test_private_statistics_have_their_own_momentum(small_backbone, images):
    patched = build(small_backbone, "scale_bias(momentum=0.25)")
    moving = patched.private()["stem_bn/scale_bias/moving_mean"]
    before = np.array(moving)
    batch = np.mean(small_backbone.model.get_layer("stem")(images / 127.5 - 1.0), axis=(0, 1, 2))
    patched.model(images, training=True)
    np.testing.assert_allclose(moving, 0.25 * before + 0.75 * batch, rtol=1e-4, atol=1e-5)
    assert set(patched.statistics_momentum.values()) == {0.25}


def test_recalibration_can_be_left_out(small_backbone):
    patched = build(small_backbone, "scale_bias(recalibrate=false)")
    assert patched.recalibrated == frozenset()
    assert len(patched.statistics_momentum) == 6


def test_shared_batch_normalisation_follows_training_where_shared_weights_are_trained(small_backbone, images):
    patched = build(small_backbone, "head", shared_trained=True)
    before = small_backbone.tensors()
    outputs = [np.array(patched.model(images, training=training)) for training in (False, True)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    moved = {key for key, value in small_backbone.tensors().items() if not np.array_equal(value, before[key])}
    assert moved == {key for key in before if "moving_" in key}
    assert {p.key for p in patched.parameters if p.role == STATISTICS and p.owner == SHARED} == moved
    assert patched.statistics_momentum == dict.fromkeys(moved, 0.9)
    assert patched.recalibrated == frozenset()


def test_shared_weights_learn_where_they_are_trained(small_backbone, images):
    patched = build(small_backbone, "scale_bias+head", shared_trained=True)
    before = small_backbone.tensors()
    fit(patched.model, images)
    moved = {key for key, value in small_backbone.tensors().items() if not np.array_equal(value, before[key])}
    assert moved == {"stem/kernel", "spatial/kernel", "mix/kernel"}
    assert {p.key for p in patched.parameters if p.owner == SHARED and p.role == TRAINED} == moved


@pytest.mark.parametrize("spec", ["scale_bias(statistics=frozen)+head", "scale_bias(affine=frozen)+head"])
def test_the_backbones_half_of_a_patched_batch_normalisation_is_fixed(small_backbone, images, spec):
    """Even where shared weights are trained: two tasks with other policies could not agree on it otherwise."""
    patched = build(small_backbone, spec, shared_trained=True)
    kept = ("moving_mean", "moving_variance") if "statistics=frozen" in spec else ("gamma", "beta")
    fixed = {p.key for p in patched.parameters if p.owner == SHARED and p.role == FIXED}
    assert fixed == {f"{layer}_bn/{name}" for layer in ("stem", "spatial", "mix") for name in kept}


def test_tasks_do_not_disturb_each_others_batch_normalisation(small_backbone, images):
    """One backbone, a task on frozen shared weights and one on trained shared weights, in both orders."""
    frozen = build(small_backbone, "head")
    trained = build(small_backbone, "head", shared_trained=True)
    frozen_again = build(small_backbone, "head")
    for task in (frozen, frozen_again):
        np.testing.assert_array_equal(task.model(images, training=True), task.model(images))
    assert np.abs(np.array(trained.model(images, training=True)) - np.array(trained.model(images))).max() > 1e-3


def test_statistics_of_a_normalisation_layer_are_never_trained(images):
    """`keras.layers.Normalization` (EfficientNet's first layer) has float variables that no gradient reaches."""
    image = keras.Input((None, None, 3))
    normalised = layers.Normalization(name="normalise")
    normalised.adapt(images)
    backbone = backbones.from_model(keras.Model(image, layers.Conv2D(4, 3, name="stem")(normalised(image))))
    patched = build(backbone, "head", shared_trained=True)
    roles = {p.key: p.role for p in patched.parameters if p.key.startswith("normalise/")}
    assert roles == {"normalise/mean": FIXED, "normalise/variance": FIXED, "normalise/count": RANDOM}
    full = build(backbone, "full")
    np.testing.assert_allclose(full.model(images), build(backbone, "none").model(images), atol=1e-5)
    np.testing.assert_allclose(fold(full.model)(images), full.model(images), atol=1e-5)
