"""Many tasks on one loaded backbone."""

import gc
import threading
import weakref

import numpy as np
import pytest

from k4p1 import errors
from k4p1.patches.apply import apply_patches
from k4p1.patches.patch_file import save_head, save_patch
from k4p1.patches.patched_layer import PatchedLayer
from k4p1.serving import patch_set
from k4p1.serving.patch_set import PatchSet

LABELS = ("cat", "dog")


def saved(backbone, folder, name, spec="parallel_adapter+scale_bias+head", labels=LABELS, seed=0):
    """The patch file of a task with private values drawn by a seed."""
    patched = apply_patches(backbone, spec, classes=len(labels), image_size=16, name=name)
    random = np.random.default_rng(seed)
    for key, variable in patched.private().items():
        values = random.normal(0.0, 0.3, variable.shape)
        variable.assign(1.0 + np.abs(values) if key.endswith(("gamma", "variance")) else values)
    path = folder / f"{name}.safetensors"
    save_patch(path, patched, backbone, task=name, labels=labels)
    return path


@pytest.fixture
def two(small_backbone, tmp_path):
    patches = PatchSet(small_backbone)
    for seed, name in enumerate(("a", "b")):
        assert patches.add(saved(small_backbone, tmp_path, name, seed=seed)) == name
    return patches


def test_tasks_come_and_go(two, small_backbone, images, tmp_path):
    assert two.names == ["a", "b"] and two.labels("a") == LABELS
    a, b = two("a", images), two("b", images)
    assert np.abs(a - b).max() > 1e-3
    before = small_backbone.fingerprint()
    two.delete("a")
    assert two.names == ["b"]
    with pytest.raises(errors.ConfigError, match=r"unknown task of this set 'a'.*Known: b"):
        two("a", images)
    np.testing.assert_array_equal(two("b", images), b)
    two.add(tmp_path / "a.safetensors", name="again")
    np.testing.assert_array_equal(two("again", images), a)
    assert small_backbone.fingerprint() == before


def test_a_deleted_task_frees_its_patch(two):
    private = weakref.ref(two.model("a"))
    two.delete("a")
    gc.collect()
    assert private() is None


def test_tasks_share_the_memory_of_the_backbone(two, small_backbone):
    shared = {id(v) for v in small_backbone.model.variables}
    for name in two.names:
        held = [v for v in two.model(name).variables if id(v) not in shared]
        assert sum(int(np.prod(v.shape)) for v in held) < 400


def test_threads_do_not_disturb_one_another(two, images):
    expected = {name: two(name, images) for name in two.names}
    wrong, errors_met = [], []

    def ask(name):
        try:
            for _ in range(20):
                if not np.array_equal(two(name, images), expected[name]):
                    wrong.append(name)
        except Exception as e:
            errors_met.append(e)

    def change(folder_name):
        try:
            for index in range(5):
                two.combine(f"{folder_name}{index}", {"a": 0.5, "b": 0.5})
                two.delete(f"{folder_name}{index}")
        except Exception as e:
            errors_met.append(e)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", "a", "b")]
    threads.append(threading.Thread(target=change, args=("mix",)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not errors_met


def test_merge_makes_a_plain_copy_and_unmerge_is_bit_equal(two, images, small_backbone):
    before, values = two("a", images), small_backbone.tensors()
    merged = two.merge("a")
    assert not any(isinstance(layer, PatchedLayer) for layer in merged._flatten_layers())
    assert two.model("a") is merged
    np.testing.assert_allclose(two("a", images), before, atol=1e-5 * max(1.0, np.abs(before).max()))
    two.unmerge("a")
    np.testing.assert_array_equal(two("a", images), before)
    for key, value in small_backbone.tensors().items():
        np.testing.assert_array_equal(value, values[key])


def test_a_combination_is_the_weighted_sum_of_private_values(two, images):
    two.combine("alone", {"a": 1.0})
    np.testing.assert_array_equal(two("alone", images), two("a", images))
    two.combine("mean", {"a": 0.25, "b": 0.75})
    parts = {name: two._get(name).stored() for name in ("a", "b", "mean")}
    for key, value in parts["mean"].items():
        np.testing.assert_allclose(value, 0.25 * parts["a"][key] + 0.75 * parts["b"][key], rtol=1e-6, atol=1e-7)


def test_what_cannot_be_combined(two, small_backbone, tmp_path):
    two.add(saved(small_backbone, tmp_path, "other_spec", "scale_bias+head"))
    two.add(saved(small_backbone, tmp_path, "other_labels", labels=("x", "y")))
    two.add(saved(small_backbone, tmp_path, "masked", "mask+head"))
    for weights, message in (
        ({"a": 0.5, "other_spec": 0.5}, "different patch specs"),
        ({"a": 0.5, "other_labels": 0.5}, "different labels"),
        ({"masked": 1.0}, "bits have no weighted sum"),
        ({}, "at least one task"),
    ):
        with pytest.raises(errors.PatchError, match=message):
            two.combine("new", weights)
    with pytest.raises(errors.ConfigError, match="has a task 'b'"):
        two.combine("b", {"a": 1.0})
    assert "new" not in two.names


def test_tasks_with_different_shared_heads_are_not_combined(small_backbone, tmp_path):
    patches = PatchSet(small_backbone, heads=tmp_path / "heads")
    for seed, name in enumerate(("a", "b")):
        patched = apply_patches(small_backbone, "scale_bias", classes=2, image_size=16, name=name, seed=seed)
        save_patch(tmp_path / f"{name}.safetensors", patched, small_backbone, task=name, labels=LABELS)
        save_head(tmp_path / "heads", patched, LABELS)
        patches.add(tmp_path / f"{name}.safetensors")
    with pytest.raises(errors.PatchError, match="different shared heads"):
        patches.combine("both", {"a": 0.5, "b": 0.5})


def test_a_patch_for_another_backbone_leaves_the_set_as_it_was(two, plain_backbone, tmp_path):
    path = saved(plain_backbone, tmp_path, "stranger", "scale_bias+head")
    with pytest.raises(errors.ArtifactError, match="another structure"):
        two.add(path)
    assert two.names == ["a", "b"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": float("inf")}, "the weight of 'a' is inf; expected a finite number"),
        ({"a": "0.5"}, "the weight of 'a' is '0.5'; expected a finite number"),
        ({"a": True}, "the weight of 'a' is True; expected a finite number"),
        ({"a": -1.0}, "would hold a negative variance"),
        ({"a": 1e300}, "would hold values that are not finite; give smaller weights"),
    ],
)
def test_weights_that_make_no_task_are_refused(weights, message, two):
    with pytest.raises(errors.PatchError, match=message):
        two.combine("new", weights)
    assert two.names == ["a", "b"]


def test_a_task_that_another_thread_deletes_is_unknown_and_nothing_else(two, monkeypatch):
    """`combine` looks up models and labels at one moment: none of its look-ups comes later."""
    build = patch_set.apply_patches

    def delete_first(*args, **kwargs):
        two.delete("b")
        return build(*args, **kwargs)

    monkeypatch.setattr(patch_set, "apply_patches", delete_first)
    two.combine("both", {"a": 0.5, "b": 0.5})
    assert two.names == ["a", "both"] and two.labels("both") == LABELS
    with pytest.raises(errors.ConfigError, match="unknown task of this set 'b'"):
        two.combine("again", {"a": 0.5, "b": 0.5})
