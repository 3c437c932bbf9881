"""Folders of runs whose files were altered, and data that goes away: exit 2 and one line that names the file."""

import json
import shutil

import keras
import numpy as np
import pytest

from k4p1 import backbones, errors
from k4p1.cli import main
from k4p1.files import status_file, tensor_file
from k4p1.methods import finetune
from k4p1.tasks import Task

USAGE, DATA = 1, 2


def tiny(dropout=0.0):
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(6, 3, strides=2, name="stem")(image)
    if dropout:
        x = keras.layers.Dropout(dropout, name="drop")(x)
    return backbones.from_model(keras.Model(image, x, name="tiny"), name="tiny", scaling="symmetric")


def trained(folder, **task):
    """Fine-tunes a head in a second."""
    given = {"data": "embedded/parity", "patch": "head", "image_size": 16, "batch_size": 16, "steps": 2}
    given |= {"name": "parity", **task}
    return finetune.finetune(
        backbone=tiny, task=Task(**given), model_dir=folder, quiet=True, recalibration_batches=1, evaluate_every=1
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    trained(folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and returns its only line of error."""

    def run(arguments, code=DATA):
        assert main.main([str(a) for a in arguments]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("k4p1: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return run


WRONG = {
    "no JSON": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1, 2]",
    "a number": lambda text: "3",
    "nested": lambda text: "[" * 100_000,
    "bytes": lambda text: "\udcff",
}
READ_BY = {
    "run.json": [["inspect"]],
    "result.json": [["inspect"], ["status"]],
    "status.json": [["status"]],
    "tasks/parity/task.json": [["evaluate", "--model_dir"]],
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", READ_BY)
def test_a_file_that_is_no_record(name, how, copied, refused):
    path = copied / name
    path.write_text(WRONG[how](path.read_text()), encoding="utf-8", errors="surrogateescape")
    for command in READ_BY[name]:
        assert str(path) in refused([*command, copied])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run.json", {"versions": 3}, "field 'versions' is 3; expected an object of text"),
        ("run.json", {"config_hash": None}, "field 'config_hash' is None; expected text"),
        ("result.json", {"tasks": {"parity": 3}}, "field 'tasks' is {'parity': 3}; expected an object of an object"),
        ("result.json", {"model_size_ratio": "much"}, "field 'model_size_ratio' is 'much'; expected a number or null"),
        ("status.json", {"state": 3}, "field 'state' is 3; expected text"),
        ("status.json", {"tasks": {"parity": {"done": "x"}}}, "tasks parity: field 'done' is 'x'; expected a whole number"),
        ("status.json", {"workers": {"first": {}}}, "field 'workers' is {'first': {}}; expected an object by number"),
        ("status.json", {"events": [{"text": "x"}]}, "field 'events' is"),
        ("tasks/parity/task.json", {"seed": "x"}, "field 'seed' is 'x'; expected a whole number"),
        ("tasks/parity/task.json", {"image_size": "x"}, "image_size='x'; expected a positive whole number"),
        ("tasks/parity/task.json", {"patch": "hed"}, "unknown patch kind 'hed'; did you mean 'head'"),
        ("tasks/parity/task.json", {"colour": 3}, "unexpected keyword argument 'colour'"),
        ("tasks/parity/task.json", {"metrics": "accuracy"}, "field 'metrics' is 'accuracy'; expected a list"),
        ("tasks/parity/task.json", {"data_dir": 3}, "field 'data_dir' is 3; expected text or null"),
    ],
)
def test_a_field_that_is_wrong(name, change, message, copied, refused):
    path = copied / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    line = refused([*READ_BY[name][-1], copied])
    assert str(path) in line and message in line


def test_a_run_is_not_resumed_with_a_damaged_record(copied):
    (copied / "run.json").write_text("[]")
    with pytest.raises(errors.ArtifactError, match=r"run.json holds \[\]; expected an object"):
        trained(copied)


def test_a_damaged_status_does_not_stop_a_run(copied):
    (copied / status_file.NAME).write_text("{")
    trained(copied)
    assert status_file.read(copied)["state"] == "finished"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tasks/parity/patch.safetensors", {"patch": "{}"}, "has no field 'task'; expected the name of a task"),
        ("tasks/parity/patch.safetensors", {"patch": "["}, "cannot read the description in"),
        ("backbone/backbone.safetensors", {"config": "3"}, "holds 3; expected an object"),
        ("backbone/backbone.safetensors", {"config": '{"keras_model": {}}'}, "cannot rebuild backbone 'tiny'"),
        ("backbone/backbone.safetensors", {"config": '{"network": "Nothing"}'}, "unknown backbone 'Nothing'"),
        ("backbone/backbone.safetensors", {"config": '{"network": "resnet26", "width": 1e9}'}, "field 'width' is"),
        ("backbone/backbone.safetensors", {"config": '{"network": "cifar_resnet", "depth": 1e9}'}, "field 'depth' is"),
        ("backbone/backbone.safetensors", {"scaling": "x"}, "field 'scaling' is 'x'; expected one of"),
        ("backbone/backbone.safetensors", {"structure_version": "two"}, "field 'structure_version' is 'two'"),
    ],
)
def test_a_header_that_was_altered_and_hashed_again(file, change, message, copied, refused):
    path = copied / file
    kind = f"k4p1-{path.stem}"
    tensors, metadata = tensor_file.read(path, kind, 1)
    tensor_file.write(path, kind, 1, tensors, {**metadata, **change})
    for arguments in (["evaluate", "--model_dir", copied], ["inspect", path]):
        if arguments[0] == "inspect" and message.startswith(("cannot rebuild", "unknown")):
            continue  # it describes the file and builds nothing
        line = refused(arguments)
        assert message in line and str(path) in line


@pytest.mark.parametrize("network", ["MobileNetV2", "vgg16_bn", "resnet26"])
@pytest.mark.slow
def test_a_backbone_file_that_names_weights_opens_and_downloads_nothing(network, copied, refused, tmp_path, monkeypatch):
    def download(*_, **__):
        pytest.fail("a backbone file began a download")

    monkeypatch.setattr(keras.utils, "get_file", download)
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", download)
    monkeypatch.setattr("keras.src.applications.vgg16.file_utils.get_file", download)
    path = copied / "backbone" / "backbone.safetensors"
    tensors, metadata = tensor_file.read(path, "k4p1-backbone", 1)
    for weights in ("imagenet", str(tmp_path / "nowhere.h5")):
        config = json.dumps({"network": network, "weights": weights})
        tensor_file.write(path, "k4p1-backbone", 1, tensors, {**metadata, "config": config})
        assert "tensors do not fit backbone" in refused(["evaluate", "--model_dir", copied])


class TestImagesThatVanish:
    @pytest.fixture
    def folder(self, tmp_path):
        for number, label in enumerate(("cat", "dog")):
            (tmp_path / "images" / label).mkdir(parents=True)
            for i in range(12):
                pixels = np.full((16, 16, 3), 90 * number + i, np.uint8)
                keras.utils.save_img(tmp_path / "images" / label / f"{i:02}.png", pixels, scale=False)
        return tmp_path / "images"

    @pytest.mark.parametrize("patch", ["head", "full"], ids=["features once", "images"])
    def test_the_file_is_named(self, patch, folder, tmp_path, monkeypatch):
        gone = folder / "dog" / "03.png"
        begin = finetune.RunSettings.of
        monkeypatch.setattr(finetune.RunSettings, "of", lambda *a, **k: (gone.unlink(), begin(*a, **k))[1])
        listed = open_folder(folder)
        with pytest.raises(errors.DataError, match=rf"task 'pets': cannot read {gone}: No such file or directory; it was"):
            trained(tmp_path / "run", name="pets", data=listed, patch=patch, steps=4, cache=False)

    def test_evaluation_names_it_too(self, folder, tmp_path, monkeypatch, refused):
        trained(tmp_path / "run", name="pets", data=str(folder))
        opened = open_folder(folder)
        gone = folder / "cat" / "00.png"
        gone.unlink()
        monkeypatch.setattr("k4p1.runs.evaluate.open_source", lambda *_: opened)
        line = refused(["evaluate", "--model_dir", tmp_path / "run", "--split", "train+validation"])
        assert f"cannot read {gone}: No such file or directory" in line


def open_folder(folder):
    from k4p1.data import ImageFolder

    return ImageFolder(folder)


@pytest.mark.slow
def test_what_features_computed_once_leave_out_is_said(tmp_path, capsys):
    task = Task(name="parity", data="embedded/parity", patch="head", image_size=16, batch_size=16, steps=2)
    how = {"task": task, "recalibration_batches": 1, "evaluate_every": 1}
    finetune.finetune(backbone=lambda: tiny(dropout=0.5), **how)
    said = " ".join(capsys.readouterr().err.split())
    assert "features are computed once, without the dropout inside the network of parity (cache_features=False keeps" in said
    finetune.finetune(backbone=tiny, **how)
    assert "without the dropout" not in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "float32"])
@pytest.mark.slow
def test_a_run_leaves_the_policy_as_it_was(precision):
    keras.config.set_dtype_policy("mixed_float16")
    task = Task(name="parity", data="embedded/parity", patch="head", image_size=16, batch_size=16, steps=1)
    result = finetune.finetune(backbone=tiny, task=task, quiet=True, recalibration_batches=1, precision=precision)
    assert result.backbone.model.get_layer("stem").dtype_policy.name == precision
    assert keras.config.dtype_policy().name == "mixed_float16"
    with pytest.raises(errors.DataError):
        finetune.finetune(backbone=tiny, task=Task(data="./nowhere"), quiet=True, precision=precision)
    assert keras.config.dtype_policy().name == "mixed_float16"
