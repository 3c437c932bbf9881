"""Baselines that papers compare with: PackNet, learning without forgetting."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from safetensors import numpy as safetensors_numpy

import k4p1
from k4p1 import backbones, cli, errors
from k4p1.experiments.evaluate import evaluate
from k4p1.experiments.model_dir import ModelDir
from k4p1.patches.apply import apply_patches
from k4p1.tasks.losses import distillation
from tests.experiments.test_compress import arrays, folder_of_images


def task(root, name, seed=0, **changes):
    how = {"image_size": 16, "batch_size": 8, "steps": 12, "validation": 0.0, "patch": "head"}
    return k4p1.Task(name=name, data=folder_of_images(root / f"data_{name}", seed), **{**how, **changes})


def logits(folder, name, images):
    return np.array(ModelDir(folder).load_task(name).model(images))


def test_packnet_packs_tasks_one_after_another(tmp_path, images):
    backbone = backbones.cifar_resnet(depth=8)
    before = backbone.tensors()
    tasks = [task(tmp_path, "first"), task(tmp_path, "second", 1)]
    how = {"backbone_prune": 0.5, "prune": 0.75, "optimization": k4p1.Optimization(learning_rate=1e-2), "quiet": True}
    result = k4p1.packnet(backbone=backbone, tasks=tasks, model_dir=tmp_path / "run", **how)
    for key, value in backbone.tensors().items():
        np.testing.assert_array_equal(value, before[key])
    # Half of the weights stay with the first network, a quarter of the rest goes to each task in turn.
    assert result.summary["free_weights"] == pytest.approx(0.5 * 0.75 * 0.75, abs=0.01)
    packed = result.backbone.tensors()
    kernel = "stage2_block1_conv2/kernel"
    kept = np.abs(before[kernel]) >= np.median(np.abs(before[kernel]))
    np.testing.assert_array_equal(packed[kernel][kept], before[kernel][kept])
    # A task is what it was when it was packed: later tasks took only weights that it masks out.
    stage = tmp_path / "run" / "stages" / "1_first" / "retrain"
    np.testing.assert_allclose(logits(tmp_path / "run", "first", images), logits(stage, "first", images), atol=1e-5)
    stage = tmp_path / "run" / "stages" / "2_second" / "retrain"
    np.testing.assert_allclose(logits(tmp_path / "run", "second", images), logits(stage, "second", images), atol=1e-5)
    shares = {
        name: np.unpackbits(tensors["stage2_block1_conv2/mask/bits"]).mean()
        for name in ("first", "second")
        for tensors in [safetensors_numpy.load_file(ModelDir(tmp_path / "run").patch(name))]
    }
    assert shares == pytest.approx({"first": 0.625, "second": 0.71875}, abs=1e-3)
    assert set(evaluate(tmp_path / "run")) == {"first", "second"}
    with pytest.raises(errors.ConfigError, match="another configuration"):
        k4p1.packnet(backbone=backbone, tasks=tasks, model_dir=tmp_path / "run", **{**how, "prune": 0.5})
    with pytest.raises(errors.ConfigError, match="used twice"):
        k4p1.packnet(backbone=backbone, tasks=[tasks[0]] * 2, model_dir=tmp_path / "other", **how)
    assert k4p1.packnet(backbone=backbone, tasks=tasks, model_dir=tmp_path / "run", **how).summary == result.summary


def test_the_free_weights_are_those_that_are_zero():
    backbone = backbones.cifar_resnet(depth=8)
    pruned = {key: np.where(np.abs(v) < 0.05, 0, v) if "conv" in key else v for key, v in backbone.tensors().items()}
    backbone.assign(pruned)
    patched = apply_patches(backbone, "packnet", classes=2, image_size=16)
    free = {key: np.array(v) for key, v in patched.private().items() if key.endswith("/free")}
    for key, places in free.items():
        kernel = pruned[key.replace("/packnet/free", "/kernel")]
        np.testing.assert_array_equal(places, kernel == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prune": 1.0}, "prune=1.0"), ({"retrain": 0}, "retrain=0"), ({"model_dir": None}, "wants a model_dir")],
)
def test_packnet_checks_its_shares(tmp_path, changes, message):
    given = {"backbone": backbones.cifar_resnet(depth=8), "tasks": [task(tmp_path, "t")], "model_dir": tmp_path / "run"}
    with pytest.raises(errors.ConfigError, match=message):
        k4p1.packnet(**{**given, **changes})


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A finished run with one task."""
    root = tmp_path_factory.mktemp("old")
    k4p1.finetune(
        backbone=backbones.cifar_resnet(depth=8),
        task=task(root, "old", steps=40),
        optimization=k4p1.Optimization(learning_rate=1e-2),
        model_dir=root / "run",
        quiet=True,
    )
    return root


def moved(old, root, teacher):
    """A new task that moves the whole network, with the old one as teacher or without."""
    folder = ModelDir(old / "run")
    new = task(root, "new", 5, steps=60)
    tasks = [new]
    patch = str(folder.patch("old"))
    if teacher:
        tasks.append(dataclasses.replace(new, name="old", loss="distillation", teacher=patch, start=patch))
    optimization = k4p1.Optimization(learning_rate=3e-3, schedule="constant")
    return k4p1.train(
        backbone=folder.load_backbone, tasks=tasks, optimization=optimization, model_dir=root / "run", quiet=True
    )


def test_learning_without_forgetting_keeps_what_the_old_task_says(old, tmp_path):
    taught, untaught = (moved(old, tmp_path / str(teacher), teacher) for teacher in (True, False))
    probe = np.stack([example["image"] for example in arrays(5).examples("train")]).astype("float32")
    was = ModelDir(old / "run").load_task("old")
    said = np.array(was.model(probe))
    head = ModelDir(old / "run").load_task("old").head
    scaled = was.model.get_layer("input_scaling")(probe)
    forgot = np.array(head(untaught.backbone.model(scaled, training=False)))
    kept = np.array(taught.models["old"].model(probe))
    assert np.abs(kept - said).mean() < 0.75 * np.abs(forgot - said).mean()
    agreement = taught.summary["tasks"]["old"]["test_accuracy"]  # with the old network, on the new images
    assert agreement > 0.5
    # The old task is still a task: on its own data, its own labels.
    again = evaluate(tmp_path / "True" / "run", "old", data=str(old / "data_old"))["old"]
    assert again["examples"] == 20 and again["accuracy"] > 0.5
    labels = (tmp_path / "True" / "run" / "tasks" / "old" / "labels.txt").read_text().split()
    assert labels == ["blue", "green", "red"]
    before = ModelDir(old / "run").load_backbone().tensors()
    after = ModelDir(tmp_path / "True" / "run").load_backbone().tensors()
    assert any(not np.array_equal(before[key], after[key]) for key in before if key.endswith("kernel"))


def test_distillation_is_least_where_the_logits_agree():
    teacher = np.array([[2.0, -1.0, 0.5]], "float32")
    batch = {"teacher_logits": tf.constant(teacher), "temperature": 2.0}
    same, other = (float(distillation(batch, tf.constant(x))[0]) for x in (teacher, teacher[:, ::-1].copy()))
    p = np.exp(teacher / 2) / np.exp(teacher / 2).sum()
    assert same == pytest.approx(4 * -(p * np.log(p)).sum(), rel=1e-5) and same < other
    logits = tf.Variable(teacher)
    with tf.GradientTape() as tape:
        loss = distillation(batch, logits)
    np.testing.assert_allclose(tape.gradient(loss, logits), 0.0, atol=1e-6)


def test_a_teacher_goes_with_distillation_and_with_its_image_size(old, tmp_path):
    patch = str(ModelDir(old / "run").patch("old"))
    for wrong in ({"teacher": patch}, {"loss": "distillation"}):
        with pytest.raises(errors.ConfigError, match="a teacher goes with loss = 'distillation'"):
            task(tmp_path, "new", **wrong)
    lost = task(tmp_path, "new", loss="distillation", teacher="/patch.safetensors")
    with pytest.raises(errors.ArtifactError, match=r"wanted MODEL_DIR/tasks/NAME/patch.safetensors"):
        k4p1.train(backbone=ModelDir(old / "run").load_backbone, tasks=[lost], quiet=True)
    taught = task(tmp_path, "new", loss="distillation", teacher=patch, image_size=24)
    with pytest.raises(errors.ConfigError, match="24x24 pixels, its teacher of 16x16"):
        k4p1.train(backbone=ModelDir(old / "run").load_backbone, tasks=[taught], quiet=True)


def test_the_gin_file_of_learning_without_forgetting(old, tmp_path, capsys):
    folder = ModelDir(old / "run")
    bindings = {
        "old_backbone": str(folder.backbone),
        "old_patch": str(folder.patch("old")),
        "old_task": "old",
        "data": folder_of_images(tmp_path / "data", 3),
        "augment": "",
    }
    flags = [f"--gin_bindings={name} = '{value}'" for name, value in bindings.items()]
    flags += ["--gin_bindings=image_size = 16", "--gin_bindings=steps = 4", "--gin_bindings=batch_size = 8"]
    assert cli.main(["train", "--gin_file", "lwf", "--model_dir", str(tmp_path / "run"), *flags]) == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {name: entry["steps"] for name, entry in result["tasks"].items()} == {"new": 4, "old": 4}
    operative = (tmp_path / "run" / "operative_config.gin").read_text()
    assert "old/Task.teacher" in operative
