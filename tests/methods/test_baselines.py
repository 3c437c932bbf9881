"""Baselines that papers compare with: PackNet, learning without forgetting."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from safetensors import numpy as safetensors_numpy

import k4p1
from k4p1 import backbones, errors
from k4p1.cli import main
from k4p1.patches.apply import apply_patches
from k4p1.runs.evaluate import evaluate
from k4p1.runs.model_dir import ModelDir
from k4p1.tasks.distillation import Lesson
from tests.methods.test_compress import arrays, folder_of_images

pytestmark = pytest.mark.slow


def task(root, name, seed=0, **changes):
    how = {"image_size": 16, "batch_size": 8, "steps": 12, "validation_fraction": 0.0, "patch": "head"}
    return k4p1.Task(name=name, data=folder_of_images(root / f"data_{name}", seed), **{**how, **changes})


def logits(folder, name, images):
    return np.array(ModelDir(folder).load_task(name).model(images))


def rate_at_the_start(folder):
    """The learning rate of the free weights, as the rules of a stage give it."""
    optimizer = k4p1.OptimizerConfig(learning_rate=1e-2)
    task = ModelDir(folder).read_task("first")[0]
    rules = optimizer.resolved({"first": task.learning_rate})
    patched = ModelDir(folder).load_task("first")
    return next(rules.update_of(p, "first").rate for p in patched.owned() if p.key.endswith("/own"))


@pytest.mark.slow
def test_packnet_packs_tasks_one_after_another(tmp_path, images):
    backbone = backbones.cifar_resnet(depth=8)
    before = backbone.tensors()
    tasks = [task(tmp_path, "first"), task(tmp_path, "second", 1)]
    how = {"backbone_prune": 0.5, "prune": 0.75, "optimizer": k4p1.OptimizerConfig(learning_rate=1e-2), "quiet": True}
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
    rates = {how: rate_at_the_start(tmp_path / "run" / "stages" / "1_first" / how) for how in ("train", "retrain")}
    assert rates == pytest.approx({"train": 1e-2, "retrain": 1e-3})
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
    [
        ({"prune": 1.0}, "prune=1.0"),
        ({"retrain_learning_rate": 0.0}, "retrain_learning_rate=0.0; expected a positive number"),
        ({"retrain": 0}, "retrain=0"),
        ({"model_dir": None}, "needs a model_dir"),
    ],
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
        optimizer=k4p1.OptimizerConfig(learning_rate=1e-2),
        model_dir=root / "run",
        quiet=True,
    )
    return root


def moved(old, root, teacher, **changes):
    """A new task that moves the whole network, with the old one as teacher or without."""
    folder = ModelDir(old / "run")
    new = task(root, "new", 5, **{"steps": 60, **changes})
    if teacher:
        loss = "softmax_cross_entropy + 1.0*distillation(head=old)"
        new = dataclasses.replace(new, loss=loss, teacher=str(folder.patch("old")))
    optimizer = k4p1.OptimizerConfig(learning_rate=3e-3, schedule="constant")
    return k4p1.train(backbone=folder.load_backbone, tasks=[new], optimizer=optimizer, model_dir=root / "run", quiet=True)


@pytest.mark.slow
def test_learning_without_forgetting_keeps_what_the_old_task_says(old, tmp_path):
    taught, untaught = (moved(old, tmp_path / str(teacher), teacher) for teacher in (True, False))
    probe = np.stack([example["image"] for example in arrays(5).examples("train")]).astype("float32")
    was = ModelDir(old / "run").load_task("old")
    said = np.array(was.model(probe))
    scaled = was.model.get_layer("input_scaling")(probe)
    forgot = np.array(was.head(untaught.backbone.model(scaled, training=False)))
    kept = np.array(ModelDir(tmp_path / "True" / "run").load_task("old").model(probe))
    assert np.abs(kept - said).mean() < 0.75 * np.abs(forgot - said).mean()
    assert taught.summary["tasks"]["new"]["test_agreement_old"] > 0.5  # with the old network, on the new images
    # The old task is still a task: on its own data, its own labels, with the head that the run moved.
    entry = taught.summary["tasks"]["old"]
    again = evaluate(tmp_path / "True" / "run", "old")["old"]
    assert again["examples"] == 20 and again["accuracy"] == entry["test_accuracy"] > 0.5
    assert not np.array_equal(ModelDir(tmp_path / "True" / "run").load_task("old").head.kernel, was.head.kernel)
    labels = (tmp_path / "True" / "run" / "tasks" / "old" / "labels.txt").read_text().split()
    assert labels == ["blue", "green", "red"]
    before = ModelDir(old / "run").load_backbone().tensors()
    after = ModelDir(tmp_path / "True" / "run").load_backbone().tensors()
    assert any(not np.array_equal(before[key], after[key]) for key in before if key.endswith("kernel"))


def test_each_term_of_the_loss_is_logged_by_its_name(old, tmp_path):
    moved(old, tmp_path, teacher=True, validation_fraction=0.2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained
    for line in trained:
        both = line["loss_softmax_cross_entropy"] + line["loss_distillation"]
        assert line["loss"] == pytest.approx(both, rel=1e-4)
    assert any("validation_agreement_old" in line for line in lines if line["kind"] == "eval")


def lesson(temperature=2.0):
    return Lesson(None, "student", "teacher", temperature)


def test_distillation_is_least_where_the_logits_agree():
    teacher = np.array([[2.0, -1.0, 0.5]], "float32")

    def loss(logits):
        return lesson().loss({}, {"teacher": tf.constant(teacher), "student": logits})

    same, other = (float(loss(tf.constant(x))[0]) for x in (teacher, teacher[:, ::-1].copy()))
    p = np.exp(teacher / 2) / np.exp(teacher / 2).sum()
    assert same == pytest.approx(4 * -(p * np.log(p)).sum(), rel=1e-5) and same < other
    logits = tf.Variable(teacher)
    with tf.GradientTape() as tape:
        value = loss(logits)
    np.testing.assert_allclose(tape.gradient(value, logits), 0.0, atol=1e-6)


def test_a_student_follows_a_teacher_of_the_same_classes(old, tmp_path):
    """Distillation alone, from the finished task to a fresh head on the same data: the head learns the teacher's answers."""
    folder = ModelDir(old / "run")
    student = dataclasses.replace(
        task(tmp_path, "student", steps=80),
        data=str(old / "data_old"),
        loss="distillation",
        teacher=str(folder.patch("old")),
    )
    result = k4p1.finetune(
        backbone=folder.load_backbone, task=student, optimizer=k4p1.OptimizerConfig(learning_rate=1e-2), quiet=True
    )
    assert result.summary["tasks"]["student"]["test_agreement_old"] >= 0.7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": "PATCH"}, "has a teacher, and its loss no term 'distillation'"),
        ({"loss": "distillation"}, "'distillation' has no teacher"),
        ({"loss": "distillation(head=new)", "teacher": "PATCH"}, "unknown head of distillation 'new'"),
        ({"loss": "distillation(temperature=0)", "teacher": "PATCH"}, "temperature=0.0; expected a positive number"),
    ],
)
def test_what_a_task_with_a_teacher_must_say(fields, message, tmp_path):
    with pytest.raises(errors.ConfigError, match=message):
        task(tmp_path, "new", **fields)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"teacher": "/patch.safetensors"}, errors.ArtifactError, "no file /patch.safetensors"),
        ({"image_size": 24}, errors.ConfigError, "24x24 pixels, its teacher of 16x16"),
        ({"name": "old"}, errors.ConfigError, "two heads have the name 'old'"),
    ],
)
def test_teachers_that_do_not_fit(old, tmp_path, fields, error, message):
    folder = ModelDir(old / "run")
    given = {"loss": "softmax_cross_entropy+distillation(head=old)", "teacher": str(folder.patch("old")), **fields}
    taught = task(tmp_path, **{"name": "new", **given})
    with pytest.raises(error, match=message):
        k4p1.train(backbone=folder.load_backbone, tasks=[taught], quiet=True)


def test_a_teacher_on_another_backbone_cannot_lend_its_head(old, tmp_path):
    patch = str(ModelDir(old / "run").patch("old"))
    taught = task(tmp_path, "new", loss="softmax_cross_entropy+distillation(head=old)", teacher=patch)
    with pytest.raises(errors.ConfigError, match="it is for another backbone"):
        k4p1.train(backbone=lambda: backbones.cifar_resnet(depth=8), tasks=[taught], quiet=True)


def lwf(old, tmp_path, steps):
    """The command line of a small run of lwf.gin that starts from the finished task `old`."""
    folder = ModelDir(old / "run")
    bindings = {
        "old_backbone": f"'{folder.backbone}'",
        "old_patch": f"'{folder.patch('old')}'",
        "data": f"'{folder_of_images(tmp_path / 'data', 3)}'",
        "augment": "''",
        "image_size": 16,
        "steps": steps,
        "batch_size": 8,
    }
    flags = [f"--gin_bindings={name} = {value}" for name, value in bindings.items()]
    return ["train", "--gin_file", "lwf", "--model_dir", str(tmp_path / "run"), *flags]


@pytest.mark.slow
def test_the_gin_file_of_learning_without_forgetting(old, tmp_path, capsys):
    assert main.main(lwf(old, tmp_path, steps=4)) == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {name: entry["steps"] for name, entry in result["tasks"].items()} == {"new": 4, "old": 0}
    operative = (tmp_path / "run" / "operative_config.gin").read_text()
    assert "Task.teacher" in operative


@pytest.mark.processes
def test_learning_without_forgetting_on_a_cluster(old, tmp_path):
    """Workers hold the teacher's weights, and the old head is learned on the servers like any other."""
    command = [sys.executable, "-m", "k4p1", *lwf(old, tmp_path, steps=12)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(pathlib.Path(k4p1.__file__).parents[1])}
    done = subprocess.run(
        [*command, "--local_cluster", "ps:2,workers:1"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())["tasks"]
    assert result["new"]["steps"] == 12 and 0.0 <= result["new"]["test_agreement_old"] <= 1.0
    assert not np.array_equal(
        ModelDir(tmp_path / "run").load_task("old").head.kernel, ModelDir(old / "run").load_task("old").head.kernel
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained and all(
        line["loss"] == pytest.approx(line["loss_softmax_cross_entropy"] + line["loss_distillation"], rel=1e-4)
        for line in trained
    )
