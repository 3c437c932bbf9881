"""Series adapters that are trained with the backbone (RA, section 4.1), and the patches of tasks on it."""

import keras
import numpy as np
import pytest

import k4p1
from k4p1 import backbones, errors
from k4p1.backbones.series_adapters import SharedSeriesAdapter, he_std
from k4p1.methods.compress import compress
from k4p1.patches import patch_file
from k4p1.patches.apply import apply_patches
from k4p1.patches.costs import multiply_adds
from k4p1.patches.fold import fold
from tests.conftest import small_model
from tests.methods.test_compress import arrays, folder_of_images

ADAPTERS = ["stem_adapter", "mix_adapter"]


@pytest.fixture(scope="module")
def adapted():
    """Convolution, depthwise and 1x1 convolution; adapters behind the first and the last, away from their defaults."""
    backbone = backbones.from_model(small_model(), name="small", scaling="symmetric")
    made = backbones.with_series_adapters(backbone)
    random = np.random.default_rng(4)
    for key, variable in made.variables().items():
        if key.endswith(("moving_variance", "bn_gamma")):
            variable.assign(1.0 + np.abs(random.normal(size=variable.shape)))
        elif "_adapter/" in key:
            variable.assign(random.normal(0.0, 0.3, variable.shape))
    return made


def test_zero_adapters_change_nothing_and_he_ones_have_their_deviation(images):
    plain = backbones.from_model(small_model(), name="small", scaling="symmetric")
    zero = backbones.with_series_adapters(plain, init="zero")
    scaled = images / 128.0 - 1.0
    np.testing.assert_allclose(zero.model(scaled), plain.model(scaled), atol=1e-6)
    assert [site.name for site in zero.sites if isinstance(site.layer, SharedSeriesAdapter)] == ADAPTERS
    keras.utils.set_random_seed(1)
    he = backbones.with_series_adapters(lambda: backbones.cifar_resnet(depth=8))
    alphas = {key: v for key, v in he.tensors().items() if key.endswith("_adapter/alpha")}
    assert len(alphas) == 7
    for alpha in alphas.values():
        assert alpha.std() == pytest.approx((2 / alpha.shape[-1]) ** 0.5, rel=0.2)


def test_a_fused_activation_comes_behind_the_adapter():
    image = keras.Input((None, None, 3))
    model = keras.Model(image, keras.layers.Conv2D(4, 3, activation="relu", name="conv")(image))
    made = backbones.with_series_adapters(backbones.from_model(model, name="fused"))
    names = [layer.name for layer in made.model.layers][1:4]
    assert names == ["conv", "conv_adapter", "conv_activation"]
    made.model.get_layer("conv_adapter").alpha.assign(-np.eye(4))  # h - BN(h), which is nearly 0
    features = np.array(made.model(np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")))
    assert features.min() >= 0.0 and np.abs(features).max() < 1e-3


def test_a_file_gives_the_same_network(adapted, tmp_path, images):
    backbones.save(adapted, tmp_path / "backbone.safetensors")
    loaded = backbones.load(tmp_path / "backbone.safetensors")
    assert loaded.fingerprint() == adapted.fingerprint()
    np.testing.assert_allclose(loaded.model(images), adapted.model(images), atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("series_adapter+head", lambda own, shared: np.testing.assert_array_equal(own, shared)),
        ("series_adapter(init=zero)+head", lambda own, shared: np.testing.assert_array_equal(own, 0.0)),
        ("series_adapter(init=he)+head", lambda own, shared: 0.5 < own.std() / he_std(own.shape[0]) < 1.5 or pytest.fail()),
    ],
)
def test_a_tasks_patch_owns_a_copy_that_it_keeps_or_begins_anew(adapted, spec, expected, tmp_path, images):
    before = adapted.tensors()
    keras.utils.set_random_seed(0)
    patched = apply_patches(adapted, spec, classes=3, image_size=16)
    owned = {p.key: p for p in patched.owned() if p.kind == "series_adapter"}
    assert {key.split("/")[0] for key in owned} == set(ADAPTERS) and len(owned) == 10
    for name in ADAPTERS:
        alpha = owned[f"{name}/series_adapter/alpha"]
        expected(np.array(alpha.variable), before[f"{name}/alpha"])
        assert alpha.role == "trained" and owned[f"{name}/series_adapter/moving_mean"].role == "statistics"
        alpha.variable.assign(alpha.variable + 0.1)
    assert all(np.array_equal(value, before[key]) for key, value in adapted.tensors().items())
    patch_file.save_patch(tmp_path / "p.safetensors", patched, adapted, task="t", labels=["a", "b", "c"])
    loaded = patch_file.load_patch(tmp_path / "p.safetensors", adapted)
    np.testing.assert_allclose(loaded.model(images), patched.model(images), atol=1e-5)
    np.testing.assert_allclose(fold(patched.model)(images), patched.model(images), atol=1e-5)


def test_frozen_adapters_use_their_moving_statistics(adapted, images):
    frozen = apply_patches(adapted, "head", classes=3, image_size=16)
    np.testing.assert_allclose(frozen.model(images, training=True), frozen.model(images), atol=1e-6)
    moving = {p.key: p.role for p in frozen.parameters if p.key.startswith("stem_adapter/")}
    assert set(moving.values()) == {"fixed"}
    trained = apply_patches(adapted, "head", classes=3, image_size=16, shared_trained=True)
    roles = {p.key.split("/")[1]: p.role for p in trained.parameters if p.key.startswith("stem_adapter/")}
    assert roles.pop("moving_mean") == roles.pop("moving_variance") == "statistics"
    assert set(roles) == {"alpha", "bn_gamma", "bn_beta"} and set(roles.values()) == {"trained"}


def test_the_cost_of_adapters_is_counted(adapted):
    plain = backbones.from_model(small_model(), name="small", scaling="symmetric")
    counted = [multiply_adds(apply_patches(b, "head", classes=3, image_size=16).model) for b in (adapted, plain)]
    assert counted[0] - counted[1] == 8 * 8 * (6 * 6 + 6) + 8 * 8 * (8 * 8 + 8)


def test_half_of_the_adapters():
    made = backbones.with_series_adapters(backbones.cifar_resnet(depth=8))
    patched = apply_patches(made, "series_adapter(block=second)+head", classes=2, image_size=16)
    places = {p.key.split("/")[0] for p in patched.owned() if p.kind == "series_adapter"}
    assert places == {f"stage{stage}_block1_conv2_adapter" for stage in (1, 2, 3)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda b: backbones.with_series_adapters(b),
            errors.ConfigError,
            "has series adapters already, such as 'stem_adapter'",
        ),
        (lambda b: backbones.with_series_adapters(b, init="hee"), errors.ConfigError, "did you mean 'he'"),
        (lambda b: backbones.with_series_adapters(b, momentum=1.0), errors.ConfigError, "momentum=1.0"),
        (
            lambda b: apply_patches(b, "series_adapter(rank=2)+head", classes=2, image_size=16),
            errors.PatchError,
            "'stem_adapter' is an adapter of the backbone",
        ),
        (
            lambda b: apply_patches(b, "series_adapter(init=he,init_std=0.1)+head", classes=2, image_size=16),
            errors.PatchError,
            "give one of them",
        ),
    ],
)
def test_refusals(adapted, call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(adapted)
    assert "\n" not in str(caught.value)


def test_networks_without_a_place_for_adapters():
    image = keras.Input((16, 16, 3))
    inner = keras.Sequential([keras.layers.Conv2D(4, 3, name="conv")], name="inner")
    nested = backbones.from_model(keras.Model(image, inner(image)), name="nested")
    with pytest.raises(errors.ConfigError, match="convolution 'inner/conv' is in an inner model"):
        backbones.with_series_adapters(nested)
    flat = backbones.from_model(keras.Model(image, keras.layers.Flatten()(image)), name="flat")
    with pytest.raises(errors.ConfigError, match="has no convolutions that series adapters could follow"):
        backbones.with_series_adapters(flat)


@pytest.mark.slow
def test_adapters_learn_with_the_backbone_and_a_tasks_own_with_the_task(tmp_path):
    def task(name, patch):
        how = {"image_size": 16, "batch_size": 8, "steps": 20, "validation_fraction": 0.0}
        return k4p1.Task(name=name, data=folder_of_images(tmp_path / "data", 3), patch=patch, **how)

    start = backbones.with_series_adapters(backbones.from_model(small_model(), name="small", scaling="symmetric"))
    before = start.tensors()
    optimizer = k4p1.OptimizerConfig(learning_rate=1e-2)
    first = k4p1.train(
        backbone=start, tasks=[task("first", "head")], optimizer=optimizer, model_dir=tmp_path / "first", quiet=True
    )
    trained = first.backbone.tensors()
    moved = {key for key, value in trained.items() if not np.array_equal(value, before[key])}
    expected = {
        f"{name}/{v}" for name in ADAPTERS for v in ("alpha", "bn_gamma", "bn_beta", "moving_mean", "moving_variance")
    }
    assert expected <= moved
    # Its statistics are those of the data: the normalised input of alpha has mean beta and deviation gamma.
    scaled = np.stack([example["image"] for example in arrays(3).examples("train")]).astype("float32") / 128.0 - 1.0
    linear = np.array(first.backbone.model.get_layer("stem")(scaled))
    np.testing.assert_allclose(trained["stem_adapter/moving_mean"], linear.mean((0, 1, 2)), atol=0.2)
    second = k4p1.finetune(
        backbone=lambda: backbones.load(tmp_path / "first" / "backbone" / "backbone.safetensors"),
        task=task("second", "series_adapter+scale_bias+head"),
        optimizer=optimizer,
        model_dir=tmp_path / "second",
        quiet=True,
    )
    assert all(np.array_equal(value, trained[key]) for key, value in second.backbone.tensors().items())
    own = np.array(second.models["second"].private()["stem_adapter/series_adapter/alpha"])
    assert not np.array_equal(own, trained["stem_adapter/alpha"])
    with pytest.raises(errors.PatchError, match="copies of those that 'small_adapters' was trained with"):
        compress([tmp_path / "second"], tmp_path / "out", rank=0.5)
