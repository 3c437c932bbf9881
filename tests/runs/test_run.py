"""Runs as a user starts them: multi-task, transfer, resumed, refitted, in half precision."""

import json
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import k4p1
from k4p1 import data, errors
from k4p1.files import tensor_file
from k4p1.patches import patch_file
from k4p1.runs.model_dir import ModelDir
from tests.conftest import small_model

pytestmark = pytest.mark.slow


def arrays(seed=0, labels=("red", "green", "blue"), count=60):
    """The label is the brightest channel."""
    random = np.random.default_rng(seed)
    numbers = np.arange(count) % len(labels)
    images = random.integers(0, 150, (count, 16, 16, 3))
    images[np.arange(count), :, :, numbers % 3] += 100
    return data.Arrays(
        {"train": (images, numbers), "test": (images[: count // 2], numbers[: count // 2])}, labels, "colours"
    )


def task(name="a", **settings):
    return k4p1.Task(name=name, **{"data": arrays(), "image_size": 16, "batch_size": 8, "steps": 6, **settings})


def backbone():
    return k4p1.backbone_from_model(small_model(), name="small", scaling="symmetric")


SETTINGS = {"quiet": True, "recalibration_batches": 3, "optimizer": k4p1.OptimizerConfig(learning_rate=1e-2)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A multi-task run with every kind of patch on one backbone."""
    folder = tmp_path_factory.mktemp("run") / "model"
    tasks = [
        task("private", patch="scale_bias+head"),
        task("deep", patch="depthwise+head", image_size=24),
        task("one", patch="scale_bias+head(mode=shared)"),
        task("other", patch="scale_bias+head(mode=shared)", image_size=20),
    ]
    result = k4p1.train(backbone=backbone, tasks=tasks, model_dir=folder, **{**SETTINGS, "recalibration_batches": 27})
    return folder, result


def test_result_json_has_what_it_promises(finished):
    folder, _ = finished
    result = json.loads((folder / "result.json").read_text())
    assert set(result["tasks"]) == {"private", "deep", "one", "other"}
    for entry in result["tasks"].values():
        assert entry["steps"] == 6
        assert entry["patch_bytes"] > 0 and 0 <= entry["test_accuracy"] <= 1 and 0 <= entry["validation_accuracy"] <= 1
    # stem 3*3*3*6, spatial 3*3*6, mix 6*8, with the shared scales and biases of `deep` 2*(6+6+8), and one shared head 8*3+3
    assert result["shared_parameters"] == 162 + 54 + 48 + 40 + 27
    assert result["tasks"]["private"]["private_parameters"] == 40 + 27
    assert result["tasks"]["private"]["private_statistics"] == 40
    assert result["tasks"]["deep"]["private_parameters"] == 54 + 27
    assert result["tasks"]["one"]["private_parameters"] == 40


def test_docs_say_what_every_file_is(finished):
    folder, _ = finished
    page = (pathlib.Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = page.split("## What is in a model directory")[1].split("\n## ")[0]
    paths = [path.rstrip("/") for row in table.splitlines() for path in re.findall("`([^`]+)`", row.split(" | ")[0])]
    named = [re.escape(path).replace("TASK", "[^/]+").replace("_N", r"_\d+") for path in paths]
    named.append("tasks/[^/]+/labels.txt")
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file():
            assert any(re.fullmatch(f"{pattern}(/.*)?", name) for pattern in named), name


def test_no_patch_file_names_another_backbone(finished):
    folder, _ = finished
    fingerprints = {patch_file.read_info(path).fingerprint for path in folder.glob("tasks/*/patch.safetensors")}
    assert fingerprints == {tensor_file.read_header(folder / "backbone" / "backbone.safetensors")["fingerprint"]}
    assert fingerprints == {k4p1.load_backbone(folder / "backbone" / "backbone.safetensors").fingerprint()}


def test_shared_weights_learned_and_shared_heads_are_one(finished):
    folder, result = finished
    assert result.backbone.fingerprint() != backbone().fingerprint()
    heads = {patch_file.read_info(folder / "tasks" / name / "patch.safetensors").shared_head for name in ("one", "other")}
    assert len(heads) == 1 and heads != {""}
    assert len(list((folder / "backbone" / "heads").iterdir())) == 1


def test_files_give_the_models_that_were_evaluated(finished):
    folder, result = finished
    loaded = ModelDir(folder).load_backbone()
    for name, patched in result.models.items():
        images = np.random.default_rng(0).integers(0, 256, (3, *patched.image_size, 3)).astype("float32")
        again = ModelDir(folder).load_task(name, loaded)
        np.testing.assert_allclose(again.model(images), patched.model(images), atol=1e-6)


def test_evaluation_afterwards_gives_the_same_numbers(finished):
    folder, result = finished
    for split in ("test", "validation"):
        found = k4p1.evaluate(folder, "private", split, data=arrays())["private"]
        assert found["accuracy"] == pytest.approx(result.summary["tasks"]["private"][f"{split}_accuracy"])
    with pytest.raises(errors.ConfigError, match="did you mean 'test'"):
        k4p1.evaluate(folder, "private", "tests", data=arrays())
    with pytest.raises(errors.ConfigError, match="trained on a Python object; give its data"):
        k4p1.evaluate(folder, "private")
    with pytest.raises(errors.DataError, match="2 labels"):
        k4p1.evaluate(folder, "private", data=arrays(labels=("x", "y")))


def test_shared_statistics_are_recalibrated_and_private_ones_too(finished):
    """The statistics written are those of the data, not moving averages that start from the initial values."""
    _, result = finished
    pipeline_images = np.concatenate([b["inputs"] for b in _batches(16)])
    network = result.models["private"]
    stem = result.backbone.model.get_layer("stem")
    activations = stem(pipeline_images.astype("float32") / 127.5 - 1).numpy()
    private = network.private()["stem_bn/scale_bias/moving_mean"].numpy()
    np.testing.assert_allclose(private, activations.mean((0, 1, 2)), atol=0.05)
    shared = result.backbone.variables()["stem_bn/moving_mean"].numpy()
    np.testing.assert_allclose(shared, activations.mean((0, 1, 2)), atol=0.1)


def _batches(size):
    source = arrays()
    return data.Pipeline(source, data.Splits(source), (size, size), 8, 3).sequential("train")


def test_metrics_and_tensorboard_are_written(finished):
    folder, _ = finished
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(r["kind"], r["task"]) for r in records} >= {("train", "private"), ("eval", "other")}
    assert list((folder / "train" / "private").glob("events*")) and list((folder / "eval" / "other").glob("events*"))
    assert (folder / "tasks" / "one" / "labels.txt").read_text().split() == ["red", "green", "blue"]


@pytest.mark.parametrize("patch", ["scale_bias+head", "scale_bias(statistics=frozen)+head", "depthwise", "head", "full"])
def test_finetuning_leaves_the_backbone_as_it_was(patch):
    shared = backbone()
    before = shared.tensors()
    result = k4p1.finetune(backbone=shared, task=task(patch=patch), **SETTINGS)
    after = result.backbone.tensors()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    assert result.summary["tasks"]["a"]["test_accuracy"] is not None


def test_finetuning_learns():
    settings = {**SETTINGS, "optimizer": k4p1.OptimizerConfig(learning_rate=3e-2)}
    result = k4p1.finetune(backbone=backbone(), task=task(steps=80), **settings)
    assert result.summary["tasks"]["a"]["test_accuracy"] > 0.8


def test_refit_uses_validation_images_too(tmp_path):
    result = k4p1.finetune(backbone=backbone, task=task(), model_dir=tmp_path / "m", refit=True, **SETTINGS)
    assert result.summary["tasks"]["a"]["validation_accuracy"] is None  # it was trained on
    assert result.summary["tasks"]["a"]["test_accuracy"] is not None
    assert list((tmp_path / "m" / "checkpoints" / "refit").glob("step_*"))


def test_without_validation_the_last_state_is_taken():
    result = k4p1.finetune(backbone=backbone(), task=task(validation_fraction=0.0), **SETTINGS)
    assert result.summary["tasks"]["a"]["validation_accuracy"] is None


def test_finished_run_is_not_trained_again(tmp_path):
    folder = tmp_path / "m"
    first = k4p1.finetune(backbone=backbone, task=task(), model_dir=folder, **SETTINGS)
    written = _patch_hash(folder)
    again = k4p1.finetune(backbone=backbone, task=task(), model_dir=folder, **SETTINGS)
    assert _patch_hash(folder) == written
    assert first.summary["tasks"] == again.summary["tasks"]


def _patch_hash(folder):
    return tensor_file.read_header(folder / "tasks" / "a" / "patch.safetensors")["content_hash"]


def test_a_folder_of_another_run_is_refused_and_stays(tmp_path):
    folder = tmp_path / "m"
    k4p1.finetune(backbone=backbone, task=task(), model_dir=folder, **SETTINGS)
    before = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    with pytest.raises(errors.ConfigError, match=r"another configuration \(tasks\[0\].batch_size: 8 there, 4 now\)"):
        k4p1.finetune(backbone=backbone, task=task(batch_size=4), model_dir=folder, **SETTINGS)
    assert before == {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    k4p1.finetune(backbone=backbone, task=task(batch_size=4), model_dir=folder, resume=False, **SETTINGS)
    assert list(folder.glob("checkpoints.*"))  # put aside, not deleted
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("important")
    with pytest.raises(errors.ConfigError, match="not empty"):
        k4p1.finetune(backbone=backbone, task=task(), model_dir=tmp_path / "mine", **SETTINGS)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(precision, tmp_path):
    result = k4p1.finetune(backbone=backbone, task=task(), precision=precision, model_dir=tmp_path / "m", **SETTINGS)
    model = result.models["a"].model
    assert all(v.dtype == "float32" for v in model.variables if keras.backend.is_float_dtype(v.dtype))
    assert model.get_layer("logits").dtype_policy.name == "float32"
    assert np.isfinite(result.summary["tasks"]["a"]["test_loss"])
    path, difference = k4p1.export_task(model, (16, 16), ("a", "b", "c"), tmp_path / "export")
    assert path.is_dir() and difference < 0.05


def test_cached_features_train_like_the_whole_model():
    """Head only, no augmentation: training on cached features reaches what training on images reaches."""
    settings = {**SETTINGS, "optimizer": k4p1.OptimizerConfig(learning_rate=3e-2)}
    found = {
        cached: k4p1.finetune(backbone=backbone(), task=task(patch="head", steps=60), cache_features=cached, **settings)
        for cached in (None, False)
    }
    accuracies = [r.summary["tasks"]["a"]["test_accuracy"] for r in found.values()]
    assert abs(accuracies[0] - accuracies[1]) < 0.15


def test_dry_run_writes_nothing(tmp_path, capsys):
    k4p1.train(backbone=backbone, tasks=[task("a"), task("b")], model_dir=tmp_path / "m", dry_run=True, **SETTINGS)
    assert not (tmp_path / "m").exists()
    assert "one step" in capsys.readouterr().out


def test_a_head_that_stays_random_is_said(capsys):
    k4p1.finetune(backbone=backbone, task=task(patch="scale_bias"), **SETTINGS)
    assert "add '+head' to train it" in capsys.readouterr().out


def test_unknown_setting_shows_the_nearest():
    with pytest.raises(errors.ConfigError, match="did you mean 'seed'"):
        k4p1.train(backbone=backbone, tasks=[task()], sed=1)


def test_corrupt_images_are_counted_and_named(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(10):
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
            (tmp_path / "images" / label / f"{index}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    for name in ("0", "1", "2", "3"):
        (tmp_path / "images" / "cat" / f"{name}.png").write_bytes(b"no picture")
    result = k4p1.finetune(backbone=backbone, task=task(data=str(tmp_path / "images")), **{**SETTINGS, "quiet": True})
    bad = result.summary["tasks"]["a"]["skipped_images"]
    assert 1 <= bad <= 4
    assert f"{bad} corrupt images" in capsys.readouterr().out
