"""The scripts of examples/, in small: what they print and write is what they say."""

import functools
import importlib.util
import inspect
import json
import pathlib
import re
import shlex
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn import metrics
from sklearn.datasets import load_digits

import k4p1
from k4p1 import backbones, data
from k4p1.cli import main
from k4p1.data import preprocessing
from k4p1.patches import patch_file, task_head
from k4p1.tasks.objectives import objective

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(script):
    """The script as a module that is not `__main__`."""
    spec = importlib.util.spec_from_file_location(f"example_{script}", EXAMPLES / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(folder):
    """What a run wrote of its tasks."""
    return json.loads((folder / "result.json").read_text())["tasks"]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """An objective that a script registers goes with the test."""
    monkeypatch.setattr(objective, "_OBJECTIVES", objective.known())
    monkeypatch.setattr(task_head, "_HEADS", dict(task_head._HEADS))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the main() of a script with `--model_dir tmp_path/run`; gives the module and the lines that it printed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # A short run spends most of its time on tracing what evaluates it.
    monkeypatch.setattr(k4p1, "Task", functools.partial(k4p1.Task, validation_fraction=0.0))
    for function in (k4p1.train, k4p1.finetune):
        quick = functools.partial(function, checkpoint_every=10**9, recalibration_batches=2)
        monkeypatch.setattr(k4p1, function.__name__, quick)

    def run(script, *flags):
        module = load(script)
        monkeypatch.setattr(sys, "argv", [script, "--model_dir", str(tmp_path / "run"), *map(str, flags)])
        capsys.readouterr()
        module.main()
        return module, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def asked(monkeypatch):
    """The arguments with which a script made a MobileNetV2; it gets a smaller network, which is built in less time."""
    asked, signature = {}, inspect.signature(k4p1.mobilenet_v2)

    def smaller(*args, **kwargs):
        asked.update(signature.bind(*args, **kwargs).arguments)
        return k4p1.cifar_resnet(depth=8)

    monkeypatch.setattr(k4p1, "mobilenet_v2", smaller)
    return asked


def test_no_script_is_left_out():
    assert {f"test_{script}" for script in SCRIPTS} == {name for name in globals() if name[5:] in SCRIPTS}
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_says_of_its_command_is_so(script, monkeypatch, capsys):
    module = load(script)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    usage = capsys.readouterr().out
    told = re.findall(rf"^ *(python examples/{script}\.py.*)$", module.__doc__, re.MULTILINE)
    assert told[0] == f"python examples/{script}.py"
    in_readme = re.findall(rf"^python examples/{script}\.py.*$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    for command in told + in_readme:
        for flag in (word for word in shlex.split(command) if word.startswith("--")):
            assert flag in usage, command


def test_finetune_folder(run, asked, tmp_path):
    _, lines = run("finetune_folder", "--steps", 20)
    assert asked == {"weights": None, "width": 0.35}
    written = sorted((tmp_path / "k4p1_digits").glob("*/*.png"))
    assert len(written) == 1797 and {path.parent.name for path in written} == set("0123456789")
    pixels = {preprocessing.decode(tf.constant(path.read_bytes())).numpy().tobytes() for path in written[:20]}
    digits = data.embedded("digits")
    known = {e["image"].tobytes() for split in digits.sizes() for e in digits.examples(split).as_numpy_iterator()}
    assert pixels <= known

    accuracy = result(tmp_path / "run")["folder"]["test_accuracy"]
    assert f"test accuracy: {accuracy:.3f}" in lines
    model = k4p1.load_task(tmp_path / "run", "folder")
    for path, line in zip((written[0], written[-1]), lines[-2:], strict=True):
        image = preprocessing.resize(preprocessing.decode(tf.constant(path.read_bytes())), (32, 32))
        probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(model(image[None], training=False)))[0]
        best = ", ".join(f"{label} {probabilities[label]:.3f}" for label in np.argsort(-probabilities)[:3])
        assert line == f"{path} {best}"


def test_finetune_folder_reads_a_folder_of_yours(run, asked, tmp_path):
    for label, value in {"dark": 20, "light": 230}.items():
        (tmp_path / "own" / label).mkdir(parents=True)
        for number in range(20):
            image = np.full((12, 12, 3), value + number, np.uint8)
            (tmp_path / "own" / label / f"{number}.jpg").write_bytes(tf.io.encode_jpeg(image).numpy())
    _, lines = run("finetune_folder", "--data", tmp_path / "own", "--steps", 20, "--weights", "w.h5", "--image_size", 8)
    assert asked == {"weights": "w.h5", "width": 0.35}
    assert result(tmp_path / "run")["folder"]["test_accuracy"] == 1.0
    assert [line.split()[1] for line in lines[-2:]] == ["dark", "light"]
    assert not (tmp_path / "k4p1_digits").exists()


def test_two_tasks(run, tmp_path):
    module, lines = run("two_tasks", "--steps", 40)
    found = {**result(tmp_path / "run" / "together"), **result(tmp_path / "run" / "third")}
    assert list(found) == ["digits", "parity", "loops"]
    for (name, task), chance in zip(found.items(), (0.1, 0.5, 0.6), strict=True):
        private = task["private_parameters"]
        assert f"{name}: test accuracy {task['test_accuracy']:.3f} with {private:,} private parameters" in lines
        assert task["test_accuracy"] > chance + 0.1
    assert "backbone unchanged by the third task: True" in lines
    left, used = (tmp_path / "run" / part / "backbone" / "backbone.safetensors" for part in ("together", "third"))
    assert backbones.load(left).fingerprint() == backbones.load(used).fingerprint()
    assert backbones.load(left).fingerprint() != k4p1.cifar_resnet(depth=8).fingerprint()

    digits, loops = data.embedded("digits"), module.loops()
    assert loops.sizes() == digits.sizes()
    pairs = zip(digits.examples("test").as_numpy_iterator(), loops.examples("test").as_numpy_iterator(), strict=True)
    for digit, loop in pairs:
        assert np.array_equal(digit["image"], loop["image"])
        assert loops.labels[loop["label"]] == ("loop" if digit["label"] in (0, 6, 8, 9) else "no loop")


def test_compare_kinds(run, tmp_path):
    module, lines = run("compare_kinds", "--steps", 25)
    rows = [[cell.strip() for cell in re.split("[│|]", line)[1:-1]] for line in lines if "head" in line]
    assert [row[0] for row in rows] == list(module.SPECS.values())
    accuracies, privates, sizes = zip(*([float(cell.replace(",", "")) for cell in row[1:]] for row in rows), strict=True)
    folder = tmp_path / "run" / "patches"
    assert accuracies == tuple(round(task["test_accuracy"], 3) for task in result(folder).values())
    assert accuracies[0] < accuracies[2] and accuracies[2] > 0.4
    assert privates[0] == 65 * 10 and privates[0] < privates[1] < privates[2]
    assert sizes == tuple((folder / "tasks" / name / "patch.safetensors").stat().st_size for name in module.SPECS)
    assert 4 * privates[1] < sizes[1] and sizes[2] < privates[2]  # four bytes per value, one bit per weight

    kept = backbones.load(folder / "backbone" / "backbone.safetensors").fingerprint()
    assert kept == backbones.load(tmp_path / "run" / "backbone" / "backbone" / "backbone.safetensors").fingerprint()


def test_serve_patch_set(run, tmp_path):
    _, lines = run("serve_patch_set", "--steps", 20)
    printed = dict(line.split(": ") for line in lines if ": " in line)
    test = next(iter(data.embedded("digits").examples("test").batch(8)))
    images = preprocessing.resize(test["image"], (32, 32))
    for name, labels in {"digits": "0123456789", "parity": ("even", "odd")}.items():
        logits = k4p1.load_task(tmp_path / "run", name)(images, training=False)
        assert printed[name] == ", ".join(labels[i] for i in np.argmax(logits, axis=-1))
    assert printed["truth"] == ", ".join(map(str, test["label"].numpy()))
    difference = next(line for line in lines if line.startswith("merged"))
    assert float(difference.split()[-1]) < 1e-4
    assert printed["unmerged, logits are equal"] == "True" and printed["left"] == "digits"


def test_mixed_batch(tmp_path, monkeypatch, capsys):
    tasks = [k4p1.Task(data=f"embedded/{name}", patch="scale_bias+head", image_size=32) for name in ("digits", "parity")]
    how = {"steps": 60, "learning_rate": 1e-2, "recalibration_batches": 4, "evaluate_every": 10**6, "quiet": True}
    k4p1.train(backbone=lambda: k4p1.cifar_resnet(depth=8), tasks=tasks, model_dir=tmp_path / "run", **how)
    assert (
        main.main(["export", "--together", "--model_dir", str(tmp_path / "run"), "--export_dir", str(tmp_path / "out")]) == 0
    )
    module = load("mixed_batch")
    monkeypatch.setattr(sys, "argv", ["mixed_batch", "--saved_model", str(tmp_path / "out"), "--tasks", "parity", "digits"])
    capsys.readouterr()
    module.main()
    lines = capsys.readouterr().out.splitlines()
    digits = load_digits()
    images = np.repeat(np.round(digits.images[-4:, ..., None] * (255 / 16)).astype(np.uint8), 3, axis=-1)
    for number, line in enumerate(lines):
        task = ("parity", "digits")[number % 2]
        model = k4p1.load_task(tmp_path / "run", task)
        logits = model(preprocessing.resize(tf.constant(images[number : number + 1]), (32, 32)), training=False)
        probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))[0]
        answer = f"{model.labels[int(np.argmax(probabilities))]} ({probabilities.max():.3f})"
        assert line == f"a {digits.target[-4 + number]}, asked for {task}: {answer}"
    assert len(lines) == 4


def test_own_objective(run, tmp_path):
    module, lines = run("own_objective", "--steps", 40)
    folder = tmp_path / "run"
    iou, count = re.fullmatch(r"test mean IoU: (\S+) over (\d+) images", lines[0]).groups()
    assert float(iou) == pytest.approx(result(folder)["strokes"]["test_mean_iou"], abs=6e-4)
    assert float(iou) > 0.6 and int(count) == 359
    assert patch_file.read_info(folder / "tasks" / "strokes" / "patch.safetensors").objective == "segmentation"

    drawn = np.array([[character == "#" for character in line] for line in lines[1:]])
    mask = next(iter(module.DigitStrokes().examples("train")))["mask"].numpy()[..., 0]
    assert drawn.shape == mask.shape == (8, 8) and np.mean(drawn == mask) > 0.8
    served = tf.saved_model.load(str(folder / "served" / "strokes" / "1")).signatures["serving_default"]
    answers = served(images=tf.zeros([2, 8, 8, 3], tf.uint8))
    assert answers["classes"].shape == (2, 32, 32) and not answers["classes"].numpy().any()


def test_own_objective_measures_what_scikit_learn_does(run):
    module = load("own_objective")
    draw = np.random.default_rng(0)
    truth, logits = draw.integers(0, 2, (5, 4, 4, 1)), draw.normal(size=(5, 4, 4, 2)).astype("float32")
    weights = np.array([1, 1, 0, 1, 1], "float32")  # the third image could not be read
    metric, measured = module.MeanIoU(), np.zeros((2, 2))
    for part in (slice(0, 2), slice(2, 5)):
        batch = {"mask": tf.constant(truth[part], tf.uint8), "weight": tf.constant(weights[part])}
        measured += metric.measure(batch, {"logits": logits[part]})["confusion"].numpy()
    read = weights > 0
    expected = metrics.jaccard_score(truth[read].ravel(), logits[read].argmax(-1).ravel(), average="macro")
    assert metric.result({"confusion": measured}) == pytest.approx(expected)
