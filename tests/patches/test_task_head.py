"""Heads of more than one layer: keys that do not depend on the process, roles of what they own."""

import keras
import numpy as np
import pytest

from k4p1 import errors
from k4p1.engine import plan_groups
from k4p1.engine.population import PopulationStatistics
from k4p1.engine.pure import PureTask
from k4p1.patches.apply import apply_patches
from k4p1.patches.patched_layer import FIXED, RANDOM, STATISTICS, TRAINED
from k4p1.patches.task_head import TaskHead


class DeepHead(TaskHead):
    """Two dense layers with a normalisation between, named by Keras."""

    def make(self, seed):
        layers = keras.layers
        stack = [layers.Dense(4), layers.BatchNormalization(momentum=0.9), layers.Dropout(0.2), layers.Dense(3)]
        return keras.Sequential(stack, name="head")


def test_keys_are_the_same_for_every_build(small_backbone):
    first, second = (apply_patches(small_backbone, "head", head=DeepHead(), image_size=16) for _ in range(2))
    assert list(first.private()) == list(second.private()) and len(first.private()) == 8
    second.restore(first.stored(), "the same head again")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype("float32")
    np.testing.assert_array_equal(first.model(images), second.model(images))


def test_its_normalisation_has_statistics_that_training_moves_and_recalibration_replaces(small_backbone, images):
    patched = apply_patches(small_backbone, "head", head=DeepHead(), image_size=16, name="t")
    roles = {p.key.rsplit("/", 1)[1]: p.role for p in patched.parameters if p.key.startswith("head/")}
    assert roles["moving_mean"] == roles["moving_variance"] == STATISTICS and roles["gamma"] == TRAINED
    assert any(p.role == RANDOM for p in patched.parameters)  # the seed of its dropout
    groups = plan_groups({"t": patched})
    pure = PureTask("t", patched, groups)
    vectors = {group.name: group.initial() for group in groups}
    measured = PopulationStatistics([pure], {"t": lambda: [{"inputs": images}]})(vectors, 1)
    (statistics,) = [group.name for group in groups if group.role == STATISTICS and group.owner == "t"]
    assert not np.array_equal(measured[statistics], vectors[statistics])


def test_a_random_head_stays_as_it_is(small_backbone):
    patched = apply_patches(small_backbone, "head(mode=random)", head=DeepHead(), image_size=16)
    assert {p.role for p in patched.owned()} == {FIXED}


def test_either_classes_or_a_head(small_backbone):
    for given in ({}, {"classes": 2, "head": DeepHead()}):
        with pytest.raises(errors.ConfigError, match="either classes or head"):
            apply_patches(small_backbone, "head", image_size=16, **given)


@pytest.mark.parametrize("kind", ["mask", "packnet"])
def test_a_kind_that_reads_the_shared_kernel_cannot_stand_beside_one_that_replaces_it(small_backbone, kind):
    with pytest.raises(errors.PatchError, match=rf"'{kind}' and 'depthwise' cannot share layer 'spatial'"):
        apply_patches(small_backbone, f"{kind}+depthwise", classes=2, image_size=16)
