"""Which parameters share a vector."""

import keras
import numpy as np
import pytest

from k4p1 import errors
from k4p1.engine import OptimizerConfig, groups, plan_groups


def by(run, **expected):
    return [g for g in run.groups if all(getattr(g, k) == v for k, v in expected.items())]


def test_owner_users_and_role_split_groups(make_run):
    run = make_run({"a": "scale_bias+head", "b": "depthwise+head"})
    assert {g.users for g in by(run, owner="shared", role="trained")} == {("a", "b"), ("a",), ("b",)}
    assert {g.kind for g in by(run, owner="a")} == {"scale_bias", "head"}
    assert {g.role for g in by(run, owner="a", kind="scale_bias")} == {"trained", "statistics"}
    # b batch-normalises by the shared layers and moves their statistics; a has its own
    assert {g.users for g in by(run, owner="shared", role="statistics")} == {("b",)}


def test_every_parameter_is_in_one_group(make_run):
    run = make_run({"a": "scale_bias+head", "b": "none"})
    grouped = [id(v) for g in run.groups for v in g.variables]
    expected = {id(p.variable) for patched in run.patched.values() for p in patched.parameters if p.role != "random"}
    assert len(grouped) == len(set(grouped)) and set(grouped) == expected


def test_frozen_backbone_is_fixed(make_run):
    run = make_run({"a": "scale_bias+head"}, shared_trained=False)
    assert {g.role for g in by(run, owner="shared")} == {"fixed"}


def test_weight_decay_splits_kernels_from_scales(make_run):
    run = make_run({"a": "none"}, optimizer=OptimizerConfig(weight_decay={"shared": 1e-4}))
    decayed = {name for g in by(run, owner="shared", role="trained") if g.update.weight_decay for name in g.packing.names}
    assert decayed == {"stem/kernel", "spatial/kernel", "mix/kernel"}


def test_two_tasks_must_agree_on_shared_statistics(small_backbone):
    from k4p1.patches.apply import apply_patches

    patched = {
        name: apply_patches(small_backbone, spec, classes=3, image_size=16, shared_trained=True)
        for name, spec in (("a", "scale_bias(statistics=frozen)+head"), ("b", "head"))
    }
    with pytest.raises(errors.ConfigError, match=r"'b' needs shared parameter .* statistics, task 'a' needs it fixed"):
        plan_groups(patched)


def test_write_back_sets_the_keras_variables(make_run):
    run = make_run({"a": "scale_bias+head"})
    vectors = {g.name: np.arange(g.packing.size, dtype=np.float32) for g in run.groups}
    groups.write_back(run.groups, vectors)
    for group in run.groups:
        np.testing.assert_array_equal(group.initial(), vectors[group.name])


def test_seeds_of_dropout_are_in_no_group(make_run):
    run = make_run({"a": "scale_bias+head"}, dropout=0.5)
    assert all(keras.backend.is_float_dtype(v.dtype) for g in run.groups for v in g.variables)
