"""The backbone's own batch normalisation after every task has trained a private one."""

import keras
import numpy as np
import pytest
from keras import layers

from k4p1 import backbones, errors
from k4p1.backbones.backbone import UNTOUCHED
from k4p1.patches.apply import apply_patches
from k4p1.runs import backbone_normalisation


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
