"""Patch files: what they hold, and what is refused."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from k4p1 import backbones, errors
from k4p1.files import content_hash, tensor_file
from k4p1.patches import PatchSpec, patch_file
from k4p1.patches.apply import apply_patches
from k4p1.patches.patch_file import load_patch, read_info, save_head, save_patch

LABELS = ("cat", "dog", "owl")


def patched_task(backbone, spec="scale_bias+depthwise+head", **options):
    """A task whose private values are not those it started with."""
    patched = apply_patches(backbone, spec, **{"classes": len(LABELS), "image_size": 16, **options})
    random = np.random.default_rng(0)
    for variable in patched.private().values():
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return patched


@pytest.fixture
def saved(small_backbone, tmp_path):
    """(path of a patch file, its task model)"""
    patched = patched_task(small_backbone)
    path = tmp_path / "patch.safetensors"
    save_patch(path, patched, small_backbone, task="pets", labels=LABELS, dropout=0.25)
    return path, patched


def rewrite(path, tensors=None, **described):
    """Writes a patch file again with other tensors or another description, and the hash that belongs to them."""
    old_tensors, metadata = tensor_file.read(path, patch_file.FORMAT, patch_file.VERSION)
    description = {**json.loads(metadata["patch"]), **described}
    tensor_file.write(
        path, patch_file.FORMAT, patch_file.VERSION, tensors or old_tensors, {"patch": json.dumps(description)}
    )


def same_tensors(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


# What a file holds


def test_tensors_are_the_private_parameters_by_canonical_name(saved):
    path, patched = saved
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {
        *(f"{n}_bn/scale_bias/{v}" for n in ("stem", "spatial", "mix") for v in ("gamma", "beta", "moving_mean")),
        *(f"{n}_bn/scale_bias/moving_variance" for n in ("stem", "spatial", "mix")),
        "spatial/depthwise/kernel",
        "head/head/kernel",
        "head/head/bias",
    }
    for key, variable in patched.private().items():
        np.testing.assert_array_equal(tensors[key], variable)


def test_description(saved, small_backbone):
    path, _ = saved
    info = read_info(path)
    assert dataclasses.asdict(info) == {
        "task": "pets",
        "spec": {"kinds": tuple(map(dataclasses.asdict, PatchSpec.parse("scale_bias+depthwise+head").kinds))},
        "objective": "classification",
        "labels": LABELS,
        "image_size": (16, 16),
        "dropout": 0.25,
        "scaling": "symmetric",
        "backbone": "small",
        "fingerprint": small_backbone.fingerprint(),
        "structure": small_backbone.structure_hash(),
        "shared_head": "",
        "factors": "",
        "structure_version": 2,
        "k4p1_version": info.k4p1_version,
    }
    options = json.loads(tensor_file.read_header(path)["patch"])["options"]
    assert options["scale_bias"]["momentum"] == 0.99  # defaults are written out: a later default changes no old file
    assert set(options) == {"scale_bias", "depthwise", "head"}


def test_a_later_k4p1_may_add_to_the_description(saved):
    path, _ = saved
    rewrite(path, something_new=[1, 2])
    assert read_info(path).task == "pets"


def test_load_gives_the_task_model_back(saved, small_backbone, images):
    path, patched = saved
    loaded = load_patch(path, small_backbone)
    assert (loaded.model.name, loaded.image_size, loaded.spec) == ("pets", (16, 16), patched.spec)
    assert any(isinstance(layer, keras.layers.Dropout) and layer.rate == 0.25 for layer in loaded.model.layers)
    np.testing.assert_array_equal(loaded.model(images), patched.model(images))
    assert {id(v) for v in loaded.private().values()}.isdisjoint(id(v) for v in patched.private().values())


def test_saving_twice_gives_the_same_tensors_and_hash(saved, small_backbone, tmp_path):
    path, patched = saved
    save_patch(tmp_path / "again", patched, small_backbone, task="pets", labels=LABELS, dropout=0.25)
    assert tensor_file.read_header(tmp_path / "again")["content_hash"] == tensor_file.read_header(path)["content_hash"]


# Damage


def test_a_flipped_byte_is_found_or_harmless(saved, tmp_path):
    """Every seventh byte of the header and some of the rest, flipped in all bits and in one."""
    path, _ = saved
    good, metadata = tensor_file.read(path, patch_file.FORMAT, patch_file.VERSION)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    broken = tmp_path / "broken"
    refused = 0
    for position in [*range(0, header, 7), *range(header, len(content), 23)]:
        for bits in (0xFF, 1 << position % 8):
            damaged = bytearray(content)
            damaged[position] ^= bits
            broken.write_bytes(damaged)
            try:
                tensors, found = tensor_file.read(broken, patch_file.FORMAT, patch_file.VERSION)
            except errors.ArtifactError as e:
                refused += 1
                assert "\n" not in str(e)
            else:
                assert same_tensors(tensors, good) and found == metadata, position
                assert position < header, f"the tensor byte {position} was changed, and nobody noticed"
    assert refused > 300


def test_a_flipped_bit_stops_load_patch_before_anything_is_built(saved, small_backbone):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.ArtifactError, match=r"is damaged: its content hash is [0-9a-f]{12}, it says [0-9a-f]{12}"):
        load_patch(path, small_backbone)


def test_a_truncated_file_is_refused(saved, small_backbone):
    path, _ = saved
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(errors.ArtifactError, match="is damaged or no safetensors file"):
            load_patch(path, small_backbone)


def test_a_longer_file_is_refused(saved, small_backbone):
    path, _ = saved
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(errors.ArtifactError):
        load_patch(path, small_backbone)


def test_a_missing_file(small_backbone, tmp_path):
    with pytest.raises(errors.ArtifactError, match=r"no file .*nowhere\.safetensors"):
        load_patch(tmp_path / "nowhere.safetensors", small_backbone)


def test_another_version_is_refused(saved, small_backbone):
    path, _ = saved
    tensors, metadata = tensor_file.read(path, patch_file.FORMAT, patch_file.VERSION)
    tensor_file.write(path, patch_file.FORMAT, 99, tensors, metadata)
    with pytest.raises(errors.ArtifactError, match="has version 99 of k4p1-patch; this k4p1 reads 1"):
        load_patch(path, small_backbone)


def test_another_format_is_refused(small_backbone, tmp_path):
    backbones.save(small_backbone, tmp_path / "backbone.safetensors")
    with pytest.raises(errors.ArtifactError, match=r"is no k4p1-patch file \(format: k4p1-backbone\)"):
        load_patch(tmp_path / "backbone.safetensors", small_backbone)
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(errors.ArtifactError, match=r"is no k4p1-patch file \(format: unknown\)"):
        load_patch(tmp_path / "other.safetensors", small_backbone)


def test_a_description_that_was_altered_is_refused(saved):
    """The hash covers labels and spec, too."""
    path, _ = saved
    content = path.read_bytes()
    assert content.count(b"owl") == 1
    path.write_bytes(content.replace(b"owl", b"elk"))
    with pytest.raises(errors.ArtifactError, match="is damaged: its content hash is"):
        read_info(path)


# What does not fit


def test_another_structure_is_refused(saved, plain_backbone):
    path, _ = saved
    with pytest.raises(errors.ArtifactError, match=r"is for backbone 'small' of another structure .* than 'small_plain'"):
        load_patch(path, plain_backbone)


def test_other_weights_are_refused_by_fingerprint(saved, small_backbone):
    path, _ = saved
    fingerprint = small_backbone.fingerprint()[:12]
    kernel = small_backbone.variables()["stem/kernel"]
    kernel.assign(np.array(kernel) + np.float32(1e-6))
    with pytest.raises(errors.ArtifactError) as caught:
        load_patch(path, small_backbone)
    assert f"its fingerprint is {fingerprint}" in str(caught.value)
    assert small_backbone.fingerprint()[:12] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("spatial/depthwise/kernel"), r"1 missing \(first: spatial/depthwise/kernel\)"),
        (lambda t: t.update({"x/scale_bias/gamma": np.ones(3)}), r"1 unknown \(first: x/scale_bias/gamma\)"),
        (lambda t: t.update({"head/head/bias": np.ones(4)}), r"'head/head/bias' does not fit .*\(4,\), expected \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_the_spec_are_refused(saved, small_backbone, change, message):
    path, _ = saved
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    rewrite(path, tensors)
    before = small_backbone.tensors()
    with pytest.raises(errors.ArtifactError, match=f"do(es)? not fit task 'pets' on backbone 'small'.*{message}|{message}"):
        load_patch(path, small_backbone)
    assert same_tensors(small_backbone.tensors(), before)


@pytest.mark.parametrize("dtype", ["int32", "bool", "float64", "float16"])
def test_tensors_of_another_type_are_not_cast(saved, small_backbone, dtype):
    path, _ = saved
    tensors = safetensors.numpy.load_file(path)
    rewrite(path, {**tensors, "head/head/bias": tensors["head/head/bias"].astype(dtype)})
    with pytest.raises(errors.ArtifactError, match=f"tensor 'head/head/bias' .*is {dtype}.*expected float32"):
        load_patch(path, small_backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "abc"}, "field 'labels' is 'abc'; expected a list of at least 1 of text"),
        ({"labels": []}, "field 'labels' is .*; expected"),
        ({"image_size": [16]}, "field 'image_size' is .16.; expected height and width in pixels"),
        ({"image_size": [16, 16.5]}, "field 'image_size'"),
        ({"image_size": [0, 16]}, "field 'image_size'"),
        ({"dropout": 1}, r"field 'dropout' is 1; expected a number in \[0, 1\)"),
        ({"dropout": True}, "field 'dropout' is True"),
        ({"task": "animals/dogs"}, "field 'task' is 'animals/dogs'; expected the name of a task"),
        ({"task": "n\u00e9"}, "field 'task'"),
        ({"scaling": "none at all"}, "field 'scaling' is 'none at all'; expected one of"),
        ({"fingerprint": None}, "field 'fingerprint' is None; expected a SHA-256"),
        ({"factors": "../../elsewhere"}, "field 'factors' is .*; expected a SHA-256 in hex, or nothing"),
        ({"structure_version": 99}, "structures of version 99 are unknown"),
        ({"spec": "scale_bais+head"}, "has a spec 'scale_bais.head' that cannot be used: unknown patch kind"),
        ({"spec": "head", "options": {"mask": {}}}, "has options of a kind 'mask' that its spec does not name"),
        ({"options": {"scale_bias": {"momentum": "high"}}}, r"scale_bias\(momentum='high'\): expected float"),
        ({"options": {"scale_bias": {"momentu": 0.9}}}, "unknown option of patch kind 'scale_bias' 'momentu'; did you mean"),
        ({"options": [1]}, "field 'options' is .1.; expected an object of an object of"),
        ({"objective": "segmentatoin"}, "cannot be built on 'small': unknown objective"),
    ],
)
def test_descriptions_that_no_patch_has(saved, small_backbone, change, message):
    path, _ = saved
    rewrite(path, **change)
    with pytest.raises(errors.ArtifactError, match=message) as caught:
        load_patch(path, small_backbone)
    assert str(path) in str(caught.value) or "structure_version" in change


def test_a_missing_field_is_named(saved):
    path, _ = saved
    tensors, metadata = tensor_file.read(path, patch_file.FORMAT, patch_file.VERSION)
    description = json.loads(metadata["patch"])
    del description["labels"]
    tensor_file.write(path, patch_file.FORMAT, patch_file.VERSION, tensors, {"patch": json.dumps(description)})
    with pytest.raises(errors.ArtifactError, match="has no field 'labels'; expected a list"):
        read_info(path)
    tensor_file.write(path, patch_file.FORMAT, patch_file.VERSION, tensors, {})
    with pytest.raises(errors.ArtifactError, match="has no field 'patch'; expected text"):
        read_info(path)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"task": "animals/dogs"}, errors.ConfigError, "task name 'animals/dogs': expected ASCII"),
        ({"labels": LABELS[:2]}, errors.ConfigError, r"2 labels \(cat, dog\) for a task model of 3 classes"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(how, error, message, small_backbone, tmp_path):
    given = {"task": "pets", "labels": LABELS, **how}
    with pytest.raises(error, match=message):
        save_patch(tmp_path / "patch", patched_task(small_backbone), small_backbone, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_is_neither_saved_nor_loaded(saved, small_backbone, tmp_path):
    path, patched = saved
    patched.private()["head/head/bias"].assign([0.0, np.nan, 0.0])
    with pytest.raises(errors.DivergedError, match="'head/head/bias' holds values that are not finite; not written"):
        save_patch(tmp_path / "again", patched, small_backbone, task="pets", labels=LABELS)
    assert not (tmp_path / "again").exists()
    for key, value in (("head/head/bias", np.nan), ("stem_bn/scale_bias/moving_variance", -1.0)):
        tensors = safetensors.numpy.load_file(path)
        tensors[key][0] = value
        rewrite(path, tensors)
        with pytest.raises(errors.ArtifactError, match=f"tensor '{key}' holds"):
            load_patch(path, small_backbone)
        tensors[key][0] = 1.0
        rewrite(path, tensors)


def test_stored_options_count_whatever_the_defaults_are_today(small_backbone, images, tmp_path):
    """A file of a k4p1 in which `alpha` of LoRA was 8 unless a spec said otherwise."""
    path = tmp_path / "patch"
    patched = patched_task(small_backbone, "lora(rank=2,layers=mix)+head")
    save_patch(path, patched, small_backbone, task="t", labels=LABELS)
    options = json.loads(tensor_file.read_header(path)["patch"])["options"]
    assert options["lora"]["alpha"] == 4.0
    rewrite(path, options={**options, "lora": {**options["lora"], "alpha": 8.0}})
    loaded = load_patch(path, small_backbone)
    assert str(loaded.spec) == "lora(layers=mix,rank=2,alpha=8.0)+head"
    with_alpha = patched_task(small_backbone, "lora(rank=2,layers=mix,alpha=8)+head")
    np.testing.assert_array_equal(loaded.model(images), with_alpha.model(images))
    assert np.abs(loaded.model(images) - patched.model(images)).max() > 1e-4
    rewrite(path, options={**options, "lora": {**options["lora"], "rank": 3}})
    with pytest.raises(errors.ArtifactError, match=r"lora\(rank=2\): its stored options say 3"):
        load_patch(path, small_backbone)


def test_loading_beside_a_joint_model_leaves_what_it_trains(saved, small_backbone):
    """Shared variables stay trainable in plain `fit` where another task's model trains them."""
    path, _ = saved
    joint = apply_patches(small_backbone, "head", classes=2, image_size=16, shared_trained=True)
    before = [v.path for v in joint.model.trainable_variables]
    assert len(before) > 2
    load_patch(path, small_backbone)
    assert [v.path for v in joint.model.trainable_variables] == before


def test_loading_alone_freezes_what_is_shared(saved, small_backbone):
    path, _ = saved
    loaded = load_patch(path, small_backbone)
    private = {id(v) for v in loaded.private().values()}
    assert {id(v) for v in loaded.model.trainable_variables} <= private


# Shared heads


@pytest.fixture
def shared(small_backbone, tmp_path):
    """(patch file of a task that shares its head, folder of heads, the task model)"""
    first = patched_task(small_backbone, "scale_bias+head(mode=shared)")
    first.head.kernel.assign(np.random.default_rng(3).normal(size=(8, 3)))
    save_patch(tmp_path / "patch", first, small_backbone, task="day", labels=LABELS)
    save_head(tmp_path / "heads", first, LABELS)
    return tmp_path / "patch", tmp_path / "heads", first


def test_a_shared_head_is_written_once_beside_the_patches(shared, small_backbone, images, tmp_path):
    path, heads, first = shared
    second = apply_patches(small_backbone, "depthwise+head(mode=shared)", classes=3, image_size=16, shared_head=first.head)
    save_patch(tmp_path / "second", second, small_backbone, task="night", labels=LABELS)
    save_head(heads, second, LABELS)
    assert [p.name for p in heads.iterdir()] == [f"{read_info(path).shared_head[:16]}.safetensors"]
    assert not any(key.startswith("head/") for key in safetensors.numpy.load_file(path))
    for name, task in (("patch", first), ("second", second)):
        loaded = load_patch(tmp_path / name, small_backbone, heads=heads)
        np.testing.assert_array_equal(loaded.model(images), task.model(images))


def test_a_shared_head_that_is_not_there(shared, small_backbone, tmp_path):
    path, _, _ = shared
    with pytest.raises(errors.ArtifactError, match="shares its head with other tasks; give the folder of shared heads"):
        load_patch(path, small_backbone)
    with pytest.raises(errors.ArtifactError, match="no file"):
        load_patch(path, small_backbone, heads=tmp_path)


def test_another_head_under_the_name_of_the_shared_one_is_refused(shared, small_backbone):
    path, heads, first = shared
    (file,) = heads.iterdir()
    first.head.bias.assign([1.0, 2.0, 3.0])
    save_head(heads, first, LABELS).replace(file)
    with pytest.raises(errors.ArtifactError, match=r"is not the head that .* was trained with"):
        load_patch(path, small_backbone, heads=heads)


def test_a_random_head_is_in_the_file(small_backbone, images, tmp_path):
    """It is private, if fixed: its seed alone would not survive a change of the generator."""
    patched = apply_patches(small_backbone, "head(mode=random)", classes=3, image_size=16, seed=11)
    save_patch(tmp_path / "patch", patched, small_backbone, task="t", labels=LABELS)
    loaded = load_patch(tmp_path / "patch", small_backbone)
    np.testing.assert_array_equal(loaded.model(images), patched.model(images))


# The content hash itself


def test_content_hash_sees_names_types_shapes_values_and_metadata():
    values = np.arange(6, dtype="float32")
    hashes = [
        content_hash.digest({"a": values}),
        content_hash.digest({"b": values}),
        content_hash.digest({"a": values.astype("float64")}),
        content_hash.digest({"a": values.view("int32")}),
        content_hash.digest({"a": values.reshape(2, 3)}),
        content_hash.digest({"a": values[::-1]}),
        content_hash.digest({"a": values}, {"key": "value"}),
        content_hash.digest({"a": values[:3], "b": values[3:]}),
        content_hash.digest({}),
    ]
    assert len(set(hashes)) == len(hashes)


def test_content_hash_does_not_see_layout_order_or_byte_order():
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    expected = content_hash.digest({"a": values, "b": values}, {"x": "1", "y": "2"})
    assert content_hash.digest({"b": values, "a": values}, {"y": "2", "x": "1"}) == expected
    assert content_hash.digest({"a": np.asfortranarray(values), "b": values.astype(">f4")}, {"x": "1", "y": "2"}) == expected


def test_a_task_model_is_written_as_what_it_is_part_of(small_backbone, tmp_path, images):
    patched = apply_patches(small_backbone, "scale_bias+head", classes=2, image_size=16)
    save_patch(tmp_path / "a.safetensors", patched.model, small_backbone, task="a", labels=["x", "y"])
    loaded = load_patch(tmp_path / "a.safetensors", small_backbone)
    np.testing.assert_array_equal(loaded.model(images), patched.model(images))
    with pytest.raises(errors.ConfigError, match="is no task model of this program; give what apply_patches"):
        save_patch(tmp_path / "b.safetensors", small_backbone.model, small_backbone, task="b", labels=["x", "y"])
