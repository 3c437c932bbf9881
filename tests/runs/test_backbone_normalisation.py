"""The backbone's own batch normalisation after every task has trained a private one."""

import keras
import numpy as np
import pytest
from keras import layers

import k4p1
from k4p1 import backbones, errors
from k4p1.backbones.backbone import UNTOUCHED
from k4p1.patches.apply import apply_patches
from k4p1.patches.patch_file import read_info
from k4p1.runs import backbone_normalisation
from k4p1.runs.inspection import inspect
from tests.runs.test_run import SETTINGS, arrays, task


def two_layers(scale=True):
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3))
    x = layers.BatchNormalization(scale=scale, name="norm")(layers.Conv2D(4, 3, name="conv")(image))
    return backbones.from_model(keras.Model(image, x), name="mine")


def tasks_on(backbone, *specs):
    made = {}
    for number, spec in enumerate(specs):
        patched = apply_patches(backbone, spec, classes=2, image_size=8, shared_trained=True, name=f"t{number}")
        random = np.random.default_rng(number)
        for key, variable in patched.private().items():
            if "norm/" in key:
                variable.assign(random.uniform(1.0, 2.0, variable.shape))
        made[f"t{number}"] = patched
    return made


def private(patched, name):
    return np.asarray(patched.private()[f"norm/scale_bias/{name}"], np.float64)


def test_pooled_is_one_population_and_the_mean_affine():
    backbone = two_layers()
    tasks = tasks_on(backbone, "scale_bias+head", "scale_bias+head")
    answers = {name: np.asarray(p.model(np.ones((1, 8, 8, 3)), training=False)) for name, p in tasks.items()}
    assert backbone_normalisation.fill_in(backbone, tasks, "pooled") == "pooled over t0, t1"
    found = {key.split("/")[1]: value for key, value in backbone.tensors().items() if key.startswith("norm/")}
    means = np.stack([private(p, "moving_mean") for p in tasks.values()])
    variances = np.stack([private(p, "moving_variance") for p in tasks.values()])
    np.testing.assert_allclose(found["moving_mean"], means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["moving_variance"], variances.mean(0) + means.var(0), rtol=1e-5)
    for name in ("gamma", "beta"):
        np.testing.assert_allclose(found[name], np.mean([private(p, name) for p in tasks.values()], 0), rtol=1e-6)
    for name, patched in tasks.items():
        np.testing.assert_array_equal(patched.model(np.ones((1, 8, 8, 3)), training=False), answers[name])


def test_that_of_a_task():
    backbone = two_layers(scale=False)
    tasks = tasks_on(backbone, "scale_bias+head", "scale_bias+head")
    assert backbone_normalisation.fill_in(backbone, tasks, "t1") == "that of t1"
    for name in ("beta", "moving_mean", "moving_variance"):
        np.testing.assert_allclose(backbone.tensors()[f"norm/{name}"], private(tasks["t1"], name), rtol=1e-6)


@pytest.mark.parametrize(
    ("other", "kept"),
    [("head", {"gamma", "beta", "moving_mean", "moving_variance"}), ("scale_bias(affine=frozen)+head", {"gamma", "beta"})],
)
def test_what_a_task_shares_stays_what_it_is(other, kept):
    backbone = two_layers()
    tasks = tasks_on(backbone, "scale_bias+head", other)
    before = backbone.tensors()
    said = backbone_normalisation.fill_in(backbone, tasks, "pooled")
    changed = {key.split("/")[1] for key, value in backbone.tensors().items() if not np.array_equal(value, before[key])}
    assert changed == {"gamma", "beta", "moving_mean", "moving_variance"} - kept
    assert bool(said) == bool(changed)


def test_left_as_it_was_is_said_in_the_file(tmp_path):
    backbone = two_layers()
    before = backbone.fingerprint()
    backbone.normalisation = backbone_normalisation.fill_in(backbone, tasks_on(backbone, "scale_bias+head"), "none")
    assert backbone.fingerprint() == before
    backbones.save(backbone, tmp_path / "backbone.safetensors")
    assert backbones.load(tmp_path / "backbone.safetensors").normalisation == UNTOUCHED


def test_unknown_source():
    with pytest.raises(errors.ConfigError, match="unknown backbone_normalisation 'poled'; did you mean 'pooled'"):
        backbone_normalisation.check("poled", ["digits"])


def test_normalisations_of_an_image_get_the_mean_scales_and_biases():
    image = keras.Input((None, None, 3))
    x = layers.GroupNormalization(3, name="group")(image)
    x = layers.RMSNormalization(name="rms")(layers.LayerNormalization(center=False, name="layer")(x))
    backbone = backbones.from_model(keras.Model(image, x), name="mine")
    made = tasks_on(backbone, "scale_bias+head", "scale_bias+head")
    random = np.random.default_rng(0)
    for patched in made.values():
        for variable in patched.private().values():
            variable.assign(random.uniform(1.0, 2.0, variable.shape))
    assert backbone_normalisation.fill_in(backbone, made, "pooled") == "pooled over t0, t1"
    for own, name in {"group/gamma": "gamma", "group/beta": "beta", "layer/gamma": "gamma", "rms/scale": "gamma"}.items():
        place = own.split("/")[0]
        mean = np.mean([np.asarray(p.private()[f"{place}/scale_bias/{name}"]) for p in made.values()], axis=0)
        np.testing.assert_allclose(backbone.tensors()[own], mean, rtol=1e-6)


def new_network():
    image = keras.Input((None, None, 3))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="conv")(image))
    return backbones.from_model(keras.Model(image, x), name="mine")


@pytest.mark.parametrize(
    ("spec", "is_told"), [("head", True), ("scale_bias(statistics=frozen)+head", True), ("scale_bias+head", False)]
)
def test_statistics_of_a_new_network_are_told_of(spec, is_told, capsys):
    """As a file of before has them, which does not say that nothing has trained them."""
    k4p1.finetune(backbone=new_network(), task=task("a", patch=spec, steps=1), **SETTINGS)
    assert ("uses 1 batch normalisations of 'mine' that are those of a new network" in capsys.readouterr().out) == is_told


@pytest.mark.slow
def test_what_a_file_says_comes_with_its_values(tmp_path):
    """With `weights=`, as gin files name a backbone."""
    for backbone, build in (
        (backbones.cifar_resnet(depth=8), lambda path: backbones.cifar_resnet(weights=path, depth=8)),
        (backbones.mobilenet_v2(width=0.35), lambda path: backbones.mobilenet_v2(weights=path, width=0.35)),
    ):
        backbone.normalisation = UNTOUCHED
        backbones.save(backbone, tmp_path / "backbone.safetensors")
        assert build(str(tmp_path / "backbone.safetensors")).normalisation == UNTOUCHED
        assert backbones.load(tmp_path / "backbone.safetensors").normalisation == UNTOUCHED


@pytest.mark.slow
def test_multi_task_training_writes_and_names_it(tmp_path):
    tasks = [task(name, patch="scale_bias+head", steps=2) for name in ("a", "b")]
    result = k4p1.train(backbone=new_network, tasks=tasks, model_dir=tmp_path / "run", **SETTINGS)
    rows = dict(row for _, rows in inspect(tmp_path / "run") for row in rows)
    assert rows["batch normalisation"] == result.backbone.normalisation == "pooled over a, b"
    fingerprints = {read_info(path).fingerprint for path in (tmp_path / "run").glob("tasks/*/patch.safetensors")}
    assert fingerprints == {result.backbone.fingerprint()}
    patched = apply_patches(result.backbone, "head", classes=3, image_size=16)
    assert backbone_normalisation.untouched_layers(result.backbone, patched) == 0


@pytest.mark.slow
def test_that_of_one_task_is_its_network():
    tasks = [task(name, patch="scale_bias+head", steps=2) for name in ("a", "b")]
    result = k4p1.train(backbone=new_network, tasks=tasks, backbone_normalisation="b", **SETTINGS)
    patched, images = result.models["b"], arrays().examples("test").batch(8).take(1)
    (batch,) = [one["image"].numpy().astype("float32") for one in images]
    features = keras.Model(patched.model.input, patched.head.input)(batch)
    np.testing.assert_allclose(result.backbone.model(batch), features, atol=1e-5)


@pytest.mark.slow
def test_another_choice_is_another_run(tmp_path):
    tasks = [task("a", patch="scale_bias+head", steps=1)]
    k4p1.train(backbone=new_network, tasks=tasks, model_dir=tmp_path / "run", **SETTINGS)
    with pytest.raises(errors.ConfigError, match=r"another configuration \(backbone_normalisation"):
        k4p1.train(backbone=new_network, tasks=tasks, model_dir=tmp_path / "run", backbone_normalisation="a", **SETTINGS)
