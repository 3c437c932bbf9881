"""An objective of a user's own, registered from user code: trained on one machine and on a cluster, saved, exported."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import k4p1
from k4p1 import backbones, errors
from k4p1.backbones import endpoints
from k4p1.data import Arrays, Pipeline, Splits
from k4p1.patches.fold import fold
from k4p1.patches.patch_file import read_info
from k4p1.runs.model_dir import ModelDir
from k4p1.serving.export import export
from k4p1.tasks.objectives import find
from tests.conftest import small_model
from tests.tasks.objectives import foreground

ROOT = pathlib.Path(__file__).resolve().parents[3]


def task(**changes):
    how = {"image_size": 16, "batch_size": 16, "steps": 120, "augment": "flip+shift(pixels=2)"}
    data = foreground.DigitsWithMasks()
    return k4p1.Task(
        **{"name": "ink", "data": data, "objective": "foreground", "patch": "scale_bias+head", **how, **changes}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: (result, folder)."""
    folder = tmp_path_factory.mktemp("ink") / "run"
    result = k4p1.finetune(
        backbone=backbones.cifar_resnet(depth=8),
        task=task(),
        optimizer=k4p1.OptimizerConfig(learning_rate=1e-2),
        model_dir=folder,
        recalibration_batches=5,
        quiet=True,
    )
    return result, folder


@pytest.mark.slow
def test_it_learns_and_is_selected_by_its_own_metric(run):
    entry = run[0].summary["tasks"]["ink"]
    assert entry["test_mean_iou"] > 0.8  # all paper would have about 0.4
    assert entry["validation_mean_iou"] > 0.8 and entry["test_loss"] < 0.3
    assert "test_accuracy" not in entry


def test_the_backbone_does_not_change_and_its_fingerprint_neither(run):
    before = backbones.cifar_resnet(depth=8).structure_hash()
    assert run[0].backbone.structure_hash() == before
    assert ModelDir(run[1]).load_backbone().fingerprint() == run[0].backbone.fingerprint()


def test_its_patch_file_names_it_and_loads(run):
    result, folder = run
    info = read_info(ModelDir(folder).patch("ink"))
    assert info.objective == "foreground" and info.labels == foreground.LABELS
    images = np.stack([example["image"] for example in foreground.DigitsWithMasks().examples("test").take(8)])
    expected = np.array(result.models["ink"].model(images))
    assert expected.shape == (8, 16, 16, 2)
    np.testing.assert_array_equal(ModelDir(folder).load_task("ink").model(images), expected)
    np.testing.assert_allclose(fold(result.models["ink"].model)(images), expected, atol=1e-4)


def test_evaluating_again_gives_the_same(run):
    found = k4p1.evaluate(run[1], "ink", data=foreground.DigitsWithMasks())["ink"]
    assert found["mean_iou"] == pytest.approx(run[0].summary["tasks"]["ink"]["test_mean_iou"], abs=1e-6)


def test_its_exported_model_gives_its_answers(run, tmp_path):
    path, difference = export(run[1], tmp_path)["ink"]
    assert difference < 1e-3
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    images = np.stack([example["image"] for example in foreground.DigitsWithMasks().examples("test").take(3)])
    answers = served(images=tf.constant(images))
    assert set(answers) == {"classes", "logits"} and answers["classes"].shape == (3, 16, 16)
    assert (path / "assets" / "labels.txt").read_text().split() == ["paper", "ink"]


def test_augmentation_moves_the_targets_with_the_image():
    source = foreground.DigitsWithMasks()
    splits = Splits(source, validation_fraction=0)
    for augment in ("flip", "shift(pixels=5)", "crop(area=0.3)+flip", "brightness"):
        pipeline = Pipeline(source, splits, (16, 16), 32, foreground.Mask(), augment=augment, seed=3)
        batch = next(iter(pipeline.training()))
        ink = batch["inputs"].numpy()[..., 0] > 128
        if augment == "brightness":
            continue
        agreement = np.mean(ink == (batch["mask"].numpy()[..., 0] == 1))
        assert agreement > (0.9 if "crop" in augment else 0.999), augment


def test_no_summary_for_people_is_said(run, tmp_path):
    from k4p1.serving.predict import predict

    path = tmp_path / "one.png"
    keras.utils.save_img(path, np.zeros((16, 16, 3)))
    with pytest.raises(errors.ConfigError, match="objective 'foreground' has no summary of its answers"):
        predict(run[1], "ink", [path])


def test_what_does_not_fit_is_refused():
    with pytest.raises(errors.ConfigError, match="unknown objective 'forground'; did you mean 'foreground'"):
        task(objective="forground")
    with pytest.raises(errors.ConfigError, match="unknown metric of objective 'foreground' 'accuracy'"):
        task(metrics=("accuracy",))
    with pytest.raises(errors.ConfigError, match="unknown loss term of objective 'foreground' 'softmax_cross_entropy'"):
        task(loss="softmax_cross_entropy")
    images = np.zeros((20, 16, 16, 3), np.uint8)
    without = Arrays({"train": (images, np.zeros(20, int)), "test": (images, np.zeros(20, int))}, ["a", "b"], "labels only")
    with pytest.raises(errors.DataError, match=r"labels only has no field 'mask', .* it has: image, label"):
        k4p1.finetune(backbone=backbones.cifar_resnet(depth=8), task=task(data=without), quiet=True)


def test_an_objective_that_is_not_registered_is_named(monkeypatch):
    assert find("foreground").name == "foreground"
    from k4p1.patches import task_head

    monkeypatch.delitem(task_head._HEADS, "foreground")
    with pytest.raises(errors.ConfigError, match=r"unknown objective 'foreground'.*import its module first"):
        task_head.of_objective("foreground", ("a",))


def test_tables_show_its_metric(run, capsys):
    from k4p1.runs import status, tables

    tables.print_result(run[0].summary)
    value = f"{run[0].summary['tasks']['ink']['test_mean_iou']:.3f}"
    assert value in capsys.readouterr().out
    status.report([run[1]])
    assert f"mean_iou {value}" in capsys.readouterr().out


def test_a_set_of_patches_answers_and_combines(run, tmp_path):
    images = np.stack([example["image"] for example in foreground.DigitsWithMasks().examples("test").take(2)])
    patches = k4p1.PatchSet(ModelDir(run[1]).load_backbone())
    path = ModelDir(run[1]).patch("ink")
    patches.add(path, "a")
    patches.add(path, "b")
    patches.combine("both", {"a": 0.25, "b": 0.75})
    np.testing.assert_allclose(patches("both", images), patches("a", images), atol=1e-4)


@pytest.mark.slow
def test_two_tasks_share_its_head_and_load(tmp_path):
    tasks = [task(name=name, patch="scale_bias", steps=3, augment="") for name in ("one", "two")]
    result = k4p1.train(
        backbone=backbones.cifar_resnet(depth=8), tasks=tasks, model_dir=tmp_path, recalibration_batches=1, quiet=True
    )
    images = np.stack([example["image"] for example in foreground.DigitsWithMasks().examples("test").take(2)])
    for name in ("one", "two"):
        expected = np.array(result.models[name].model(images))
        np.testing.assert_allclose(ModelDir(tmp_path).load_task(name).model(images), expected, atol=1e-6)
    assert len(list(ModelDir(tmp_path).heads.glob("*.safetensors"))) == 1


def test_an_instance_must_be_registered():
    with pytest.raises(errors.ConfigError, match="objective 'foreground' is not registered"):
        task(objective=foreground.Foreground())
    with pytest.raises(errors.ConfigError, match="expected a name or a registered Objective"):
        task(objective=["foreground"])


class TestEndpoints:
    def test_inner_models_with_layers_of_one_name(self):
        def inner(name):
            image = keras.Input((None, None, 3))
            return keras.Model(image, keras.layers.Conv2D(3, 3, strides=2, padding="same", name="conv")(image), name=name)

        image = keras.Input((None, None, 3))
        maps = inner("second")(inner("first")(image))
        backbone = backbones.from_model(keras.Model(image, maps), name="twins")
        patched = k4p1.apply_patches(backbone, "lora(rank=1)+head", head=foreground.PixelHead(2), image_size=16)
        assert patched.model(np.zeros((1, 16, 16, 3))).shape == (1, 16, 16, 2)
        assert {key.split("/lora")[0] for key in patched.private() if "/lora/" in key} == {"first/conv", "second/conv"}

    def test_the_last_map_at_each_stride(self):
        found = endpoints.strides(backbones.cifar_resnet(depth=8).model)
        assert found == {"stride_2": (2, "stage2_block1_relu"), "stride_4": (4, "stage3_block1_relu")}

    def test_of_a_users_model_with_an_inner_one(self):
        inner = small_model()
        image = keras.Input((None, None, 3))
        maps = keras.Model(inner.input, inner.layers[-2].output, name="base")(
            keras.layers.Rescaling(2.0, name="scale")(image)
        )
        model = keras.Model(image, keras.layers.GlobalAveragePooling2D(name="pool")(maps))
        backbone = backbones.from_model(model, name="nested")
        before = backbone.fingerprint()
        assert endpoints.strides(backbone.model) == {"stride_2": (2, "base/mix_relu")}
        patched = k4p1.apply_patches(backbone, "scale_bias+head", head=foreground.PixelHead(2), image_size=16)
        assert patched.model(np.zeros((1, 16, 16, 3))).shape == (1, 16, 16, 2)
        assert backbone.fingerprint() == before

    def test_by_the_name_of_a_layer(self, small_backbone):
        head = foreground.PixelHead(2)
        object.__setattr__(head, "endpoints", ("spatial_relu", "features"))
        assert k4p1.apply_patches(small_backbone, "head", head=head, image_size=16).model.output.shape == (None, 16, 16, 2)

    def test_a_stride_that_the_network_does_not_have(self, small_backbone):
        head = foreground.PixelHead(2)
        object.__setattr__(head, "endpoints", ("stride_8", "features"))
        with pytest.raises(errors.ConfigError, match="unknown endpoint 'stride_8'; did you mean 'stride_2'"):
            k4p1.apply_patches(small_backbone, "head", head=head, image_size=16)


GIN = """
import tests.tasks.objectives.foreground

train.backbone = @cifar_resnet
train.tasks = [@ink/Task(), @digits/Task()]
train.steps = 40
train.optimizer = @OptimizerConfig()
train.recalibration_batches = 2
OptimizerConfig.learning_rate = 1e-2
cifar_resnet.depth = 8
Task.image_size = 16
Task.batch_size = 8
ink/Task.name = 'ink'
ink/Task.objective = 'foreground'
ink/Task.data = @digits_with_masks()
digits/Task.name = 'digits'
digits/Task.data = 'embedded/digits'
"""


@pytest.mark.processes
def test_it_trains_on_a_local_cluster_beside_another_objective(tmp_path):
    (tmp_path / "ink.gin").write_text(GIN)
    command = [
        sys.executable,
        "-m",
        "k4p1",
        "train",
        "--gin_file",
        str(tmp_path / "ink.gin"),
        "--model_dir",
        str(tmp_path / "m"),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--local_cluster", "ps:1,workers:2"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "m" / "result.json").read_text())["tasks"]
    assert result["ink"]["steps"] == result["digits"]["steps"] == 40
    assert result["ink"]["test_mean_iou"] > 0.45 and "test_accuracy" in result["digits"]
