"""What a user can get wrong: one clear line, the right exit code, nothing half-written."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import gin
from k4p1 import backbones, errors
from k4p1.cli import main
from k4p1.data import Source
from k4p1.files import tensor_file
from k4p1.methods import finetune
from k4p1.tasks import Task

USAGE, DATA = 1, 2


def tiny(channels=6):
    """A network of one convolution, without depthwise layers."""
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3))
    features = keras.layers.Conv2D(channels, 3, strides=2, name="stem")(image)
    return backbones.from_model(keras.Model(image, features, name="tiny"), name="tiny", scaling="symmetric")


gin.external_configurable(tiny, name="tiny", module="tests")

TWO_TASKS = ["train", "--gin_file", "quickstart"]
ONE_TASK = ["finetune", "--gin_file", "finetune"]
SMALL = {
    "train": ["train.backbone = @tiny", "image_size = 16", "patch = 'head'", "steps = 1"],
    "finetune": [
        "finetune.backbone = @tiny",
        "image_size = 16",
        "patch = 'head'",
        "data = 'embedded/parity'",
        "epochs = 0.02",
        "augment = ''",
    ],
}
"""Bindings that make a run of seconds."""


def command(arguments, *bindings):
    """The arguments of a small run with further bindings."""
    given = [*SMALL[arguments[0]], *bindings]
    return [*arguments, *(part for binding in given for part in ("--gin_bindings", binding))]


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and returns its only line of error; progress and warnings may precede it."""

    def run(arguments, code):
        assert main.main([str(a) for a in arguments]) == code
        shown = capsys.readouterr().err.splitlines()
        assert "Traceback (most recent call last):" not in shown
        lines = [line for line in shown if line.startswith("k4p1: ") and not line.startswith("k4p1: warning: ")]
        assert lines == shown[-1:]
        return lines[0]

    return run


def assert_nothing_half_written(folder):
    left = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert not [name for name in left if "partial" in name or name.endswith("result.json")], left


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of one task on embedded data."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    task = Task(name="parity", data="embedded/parity", patch="head", image_size=16, batch_size=16, steps=2)
    finetune.finetune(backbone=tiny, task=task, model_dir=folder, quiet=True, recalibration_batches=1)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


NAMES = {
    "gin file": (["train", "--gin_file", "quickstat"], [], USAGE, "unknown gin file 'quickstat'; did you mean 'quickstart'"),
    "macro": (TWO_TASKS, ["step = 3"], USAGE, "unused macro 'step'; did you mean 'steps'"),
    "configurable": (TWO_TASKS, ["trian.seed = 3"], USAGE, "unknown configurable 'trian'; did you mean 'train'"),
    "parameter": (
        TWO_TASKS,
        ["Task.imagesize = 3"],
        USAGE,
        "unknown parameter of Task 'imagesize'; did you mean 'image_size'",
    ),
    "setting": (TWO_TASKS, ["train.evaluate_evry = 3"], USAGE, "unknown setting of train 'evaluate_evry'; did you mean"),
    "syntax": (TWO_TASKS, ["steps 200"], USAGE, "gin cannot read 'steps 200'"),
    "patch kind": (
        ONE_TASK,
        ["patch = 'scale_bais+head'"],
        USAGE,
        "unknown patch kind 'scale_bais'; did you mean 'scale_bias'",
    ),
    "patch option": (ONE_TASK, ["patch = 'head(mod=random)'"], USAGE, "did you mean 'mode'"),
    "embedded data": (ONE_TASK, ["data = 'embedded/digit'"], DATA, "'digit'; did you mean 'digits'"),
    "TFDS name": (ONE_TASK, ["data = 'cifar11'"], DATA, "no data set 'cifar11'"),
    "folder": (ONE_TASK, ["data = './nowhere'"], DATA, "no folder ./nowhere"),
    "backbone": (
        ONE_TASK,
        ["finetune.backbone = @application", "application.network = 'MobilNetV2'"],
        USAGE,
        "unknown backbone 'MobilNetV2'; did you mean 'MobileNetV2'",
    ),
    "augmentation": (ONE_TASK, ["augment = 'flop'"], USAGE, "unknown augmentation 'flop'; did you mean 'flip'"),
    "optimizer": (ONE_TASK, ["OptimizerConfig.optimizer = 'adm'"], USAGE, "'adm'; did you mean 'adam'"),
    "schedule": (ONE_TASK, ["OptimizerConfig.schedule = 'cosin'"], USAGE, "'cosin'; did you mean 'cosine'"),
    "precision": (ONE_TASK, ["finetune.precision = 'float61'"], USAGE, "unknown precision 'float61'; did you mean"),
    "loss": (ONE_TASK, ["Task.loss = 'softmax'"], USAGE, "did you mean 'softmax_cross_entropy'"),
    "metric": (ONE_TASK, ["Task.metrics = ['accurcy']"], USAGE, "'accurcy'; did you mean 'accuracy'"),
    "nothing to touch": (ONE_TASK, ["patch = 'depthwise+head'"], USAGE, "depthwise"),
    "name twice": (TWO_TASKS, ["parity/Task.name = 'digits'"], USAGE, "task name 'digits' is used twice"),
    "bad name": (ONE_TASK, ["name = 'a/b'"], USAGE, "task name 'a/b': expected ASCII letters"),
    "zero steps": (TWO_TASKS, ["steps = 0"], USAGE, "steps=0; expected a positive whole number"),
    "negative steps": (TWO_TASKS, ["steps = -5"], USAGE, "steps=-5; expected a positive whole number"),
    "zero epochs": (ONE_TASK, ["epochs = 0"], USAGE, "epochs=0; expected a positive number"),
    "zero batch": (ONE_TASK, ["batch_size = 0"], USAGE, "batch_size=0; expected a positive whole number"),
    "zero rate": (ONE_TASK, ["learning_rate = 0"], USAGE, "learning_rate=0; expected a positive number"),
    "small image": (
        ONE_TASK,
        ["finetune.backbone = @mobilenet_v2", "weights = None", "width = 0.35"],
        USAGE,
        "image size 16x16 is too small for MobileNetV2: at least 32 pixels",
    ),
    "no weight file": (
        ONE_TASK,
        ["finetune.backbone = @mobilenet_v2", "weights = '/nowhere/w.h5'"],
        DATA,
        "no weight file /nowhere/w.h5",
    ),
}
"""Case -> command, further bindings, exit code, part of the message."""


@pytest.mark.parametrize("case", NAMES)
def test_settings(case, refused, tmp_path):
    arguments, bindings, code, message = NAMES[case]
    line = refused([*command(arguments, *bindings), "--model_dir", tmp_path / "run"], code)
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--task", "partiy"], "'partiy'; did you mean 'parity'"),
        (["evaluate", "--split", "tests"], "'tests'; did you mean 'test'"),
        (["predict", "--task", "partiy", "x.jpg"], "'partiy'; did you mean 'parity'"),
        (["export", "--task", "partiy", "--export_dir", "unused"], "'partiy'; did you mean 'parity'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_names_in_a_finished_run(arguments, message, finished, refused):
    name, *rest = arguments
    assert message in refused([name, "--model_dir", finished, *rest], USAGE)


class TestWeights:
    def test_that_do_not_fit(self, refused, tmp_path):
        path = tmp_path / "other.weights.h5"
        tiny().model.save_weights(path)
        bindings = ["finetune.backbone = @mobilenet_v2", f"weights = '{path}'", "width = 0.35", "image_size = 32"]
        line = refused([*command(ONE_TASK, *bindings), "--model_dir", tmp_path / "run"], DATA)
        assert f"the weights of {path} do not fit MobileNetV2 of width 0.35" in line
        assert not (tmp_path / "run").exists()

    def test_that_are_no_weights(self, refused, tmp_path):
        path = tmp_path / "text.safetensors"
        path.write_text("no tensors")
        bindings = ["finetune.backbone = @mobilenet_v2", f"weights = '{path}'", "width = 0.35", "image_size = 32"]
        line = refused([*command(ONE_TASK, *bindings), "--model_dir", tmp_path / "run"], DATA)
        assert "is damaged or no safetensors file" in line


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE = pytest.mark.parametrize("damage", [flip_a_bit, cut])


class TestArtifacts:
    @DAMAGE
    @pytest.mark.parametrize("file", ["tasks/parity/patch.safetensors", "backbone/backbone.safetensors"])
    def test_a_damaged_file_is_refused(self, damage, file, copied, refused):
        damage(copied / file)
        for arguments in (["evaluate", "--model_dir", copied], ["inspect", copied / file]):
            line = refused(arguments, DATA)
            assert str(copied / file) in line
            assert "damaged" in line

    def test_a_patch_for_another_backbone_is_refused(self, copied, refused):
        other = tiny()
        other.assign({key: value + 1 for key, value in other.tensors().items()})
        backbones.files.save(other, copied / "backbone" / "backbone.safetensors")
        line = refused(["export", "--model_dir", copied, "--export_dir", copied / "export"], DATA)
        assert "with other weights: its fingerprint is" in line
        assert not (copied / "export").exists()

    @pytest.mark.slow
    def test_the_previous_good_checkpoint_is_used_and_said(self, tmp_path, capsys, caplog):
        arguments = [*command(TWO_TASKS, "steps = 2"), "--model_dir", str(tmp_path / "run")]
        assert main.main(arguments) == 0
        *_, older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*.safetensors"))
        good = tensor_file.read_header(newest)["content_hash"]
        flip_a_bit(newest)
        (tmp_path / "run" / "result.json").unlink()
        capsys.readouterr()
        assert main.main(arguments) == 0
        assert f"{newest} is damaged" in caplog.text
        assert "returning to the checkpoint before it" in caplog.text
        assert "resuming from the checkpoint at digits 2/2, parity 1/2" in capsys.readouterr().err
        tensor_file.read(newest, "k4p1-checkpoint", 1)
        assert tensor_file.read_header(newest)["content_hash"] == good
        assert older.exists()

    def test_no_run_there(self, refused, tmp_path):
        assert "does not exist; train first" in refused(["evaluate", "--model_dir", tmp_path / "none"], DATA)
        assert "holds no finished task; train first" in refused(["evaluate", "--model_dir", tmp_path], DATA)

    @pytest.mark.parametrize("name", ["missing", "text.txt", "folder"])
    def test_nothing_to_inspect(self, name, refused, tmp_path):
        (tmp_path / "text.txt").write_text("text")
        (tmp_path / "folder").mkdir()
        assert str(tmp_path / name) in refused(["inspect", tmp_path / name], DATA)

    def test_data_with_other_labels(self, finished, refused):
        line = refused(["evaluate", "--model_dir", finished, "--data", "embedded/digits"], DATA)
        assert "embedded/digits has 10 labels" in line
        assert "was trained on 2 (even, odd" in line

    @pytest.mark.parametrize(("name", "message"), [("missing.jpg", "cannot read image"), ("bad.jpg", "cannot decode image")])
    def test_an_image_that_cannot_be_read(self, name, message, finished, refused, tmp_path):
        (tmp_path / "bad.jpg").write_bytes(b"no image")
        line = refused(["predict", "--model_dir", finished, tmp_path / name], DATA)
        assert f"{message} {tmp_path / name}" in line


def write_images(root, classes=("cat", "dog"), count=12, corrupt=()):
    for number, label in enumerate(classes):
        (root / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), 40 * number + i, np.uint8)
            encoded = tf.io.encode_jpeg(pixels).numpy()
            (root / label / f"{i:02}.jpg").write_bytes(encoded[:30] if i in corrupt else encoded)


class TestImageFolders:
    def refuse(self, refused, tmp_path, *bindings):
        line = refused(
            [*command(ONE_TASK, f"data = '{tmp_path / 'images'}'", *bindings), "--model_dir", tmp_path / "run"], DATA
        )
        assert not (tmp_path / "run").exists()
        return line

    def test_empty(self, refused, tmp_path):
        (tmp_path / "images").mkdir()
        assert "has no images; expected" in self.refuse(refused, tmp_path)

    def test_one_class(self, refused, tmp_path):
        write_images(tmp_path / "images", classes=("cat",))
        assert "has one class, 'cat'; a classifier needs two or more" in self.refuse(refused, tmp_path)

    def test_too_few_images(self, refused, tmp_path):
        write_images(tmp_path / "images", count=1)
        assert "is too small" in self.refuse(refused, tmp_path)

    def test_corrupt_images_are_skipped_counted_and_named(self, tmp_path, capsys):
        write_images(tmp_path / "images", corrupt=(0, 5))
        bindings = [f"data = '{tmp_path / 'images'}'", "batch_size = 4", "epochs = 2", "validation = 0.0"]
        assert main.main([*command(ONE_TASK, *bindings), "--model_dir", str(tmp_path / "run")]) == 0
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        skipped = result["tasks"]["images"]["skipped_images"]
        assert 0 < skipped <= 4  # a fifth of the images is the test split
        out = capsys.readouterr().out
        assert f"{skipped} corrupt images of its training split were skipped" in "".join(out.splitlines())

    def test_nothing_but_corrupt_images(self, refused, tmp_path):
        write_images(tmp_path / "images", corrupt=range(12))
        bindings = [f"data = '{tmp_path / 'images'}'", "batch_size = 4", "validation = 0.0"]
        line = refused([*command(ONE_TASK, *bindings), "--model_dir", tmp_path / "run"], DATA)
        assert "none of the" in line
        assert_nothing_half_written(tmp_path / "run")


class MislabelledSource(Source):
    """Says two classes and has a third."""

    name, labels = "mislabelled", ("a", "b")

    def sizes(self):
        return {"train": 40, "test": 10}

    def examples(self, split):
        count = self.sizes()[split]
        images = np.zeros((count, 16, 16, 3), np.uint8)
        return tf.data.Dataset.from_tensor_slices({"image": images, "label": [2] * count})


@pytest.mark.parametrize("patch", ["head", "scale_bias+head"])
def test_labels_out_of_range(patch, tmp_path):
    task = Task(name="t", data=MislabelledSource(), patch=patch, image_size=16, batch_size=4, steps=2)
    with pytest.raises(errors.DataError, match="label out of range; allowed are 0 to 1, got:") as caught:
        finetune.finetune(backbone=tiny, task=task, model_dir=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == DATA
    assert len(str(caught.value).splitlines()) == 1
    assert_nothing_half_written(tmp_path / "run")


class TestModelDir:
    def test_of_another_configuration(self, finished, refused):
        before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
        line = refused([*command(ONE_TASK), "--model_dir", finished], USAGE)
        assert f"{finished} holds a run with another configuration (" in line
        assert "--noresume" in line
        assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    def test_of_something_else(self, refused, tmp_path):
        (tmp_path / "thesis.txt").write_text("text")
        assert "is not empty and holds no run of k4p1" in refused([*command(ONE_TASK), "--model_dir", tmp_path], USAGE)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_below_a_file(self, refused, tmp_path):
        (tmp_path / "file").write_text("text")
        line = refused([*command(ONE_TASK), "--model_dir", tmp_path / "file" / "run"], DATA)
        assert "a part of the path is a file, not a folder" in line

    def test_missing(self, refused):
        assert "needs --model_dir, or --dry_run" in refused(command(ONE_TASK), USAGE)


class TestStorage:
    @pytest.mark.parametrize(
        ("suffix", "number", "message"),
        [
            ("config.gin", errno.EACCES, "no write permission"),
            ("config.gin", errno.ENOSPC, "no space left on the disk"),
            ("step_00000001.safetensors", errno.ENOSPC, "no space left on the disk"),
            ("patch.safetensors", errno.ENOSPC, "no space left on the disk"),
            ("result.json", errno.ENOSPC, "no space left on the disk"),
        ],
    )
    def test_a_file_that_cannot_be_written(self, suffix, number, message, refused, tmp_path, monkeypatch):
        replace = os.replace

        def full(source, target):
            if str(target).endswith(suffix):
                raise OSError(number, os.strerror(number))
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        line = refused([*command(ONE_TASK), "--model_dir", tmp_path / "run"], DATA)
        assert line.startswith(f"k4p1: cannot write {tmp_path / 'run'}")
        assert f"{suffix}: {message}" in line
        assert_nothing_half_written(tmp_path / "run")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_write_permission(self, refused, tmp_path):
        tmp_path.chmod(0o555)
        line = refused([*command(ONE_TASK), "--model_dir", tmp_path / "run"], DATA)
        tmp_path.chmod(0o755)
        assert line == f"k4p1: cannot write {tmp_path / 'run' / 'config.gin'}: no write permission"


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="the system has no file that is always full")
def test_an_error_that_cannot_be_written_keeps_its_exit_code(monkeypatch, tmp_path):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main.main(["evaluate", "--model_dir", str(tmp_path / "nothing")]) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
