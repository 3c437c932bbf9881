"""Three phases of NetTailor on embedded digits: what is left on disk, what resumes, what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from k4p1 import backbones, errors
from k4p1.engine import OptimizerConfig
from k4p1.engine.optimizers import SGD
from k4p1.methods import nettailor as method
from k4p1.methods.nettailor import Candidate, allowance, nettailor
from k4p1.patches.fold import fold
from k4p1.runs import inspection
from k4p1.runs.model_dir import ModelDir
from k4p1.runs.stages import Phase
from k4p1.studies import network_drawing
from k4p1.tasks import Task

RATE = OptimizerConfig(learning_rate=0.01, optimizer=SGD(momentum=0.9))


def settings(folder, **changes):
    task = Task(name="digits", data="embedded/digits", patch="nettailor(k=2)+head", image_size=16, validation_fraction=0.2)
    phases = {f"{name}_phase": Phase(steps=4, optimizer=RATE) for name in ("teacher", "student", "retrain")}
    given = {"backbone": lambda: backbones.cifar_resnet(depth=8), "task": task, "model_dir": folder, "quiet": True}
    return {**given, **phases, "remove": [0, 1], "threshold": 0.0, "recalibration_batches": 2, **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tailored") / "run"
    return folder, nettailor(**settings(folder))


@pytest.mark.slow
def test_one_call_leaves_a_tailored_task(finished):
    folder, result = finished
    entry = result.summary["tasks"]["digits"]
    assert [one["removed"] for one in result.summary["sweep"]] == [0, 1]
    assert entry["blocks"] == 3 and entry["live_blocks"] == 3 - entry["removed_blocks"]
    assert {"test_accuracy", "teacher_test_accuracy", "teacher_validation"} <= entry.keys()
    stage = json.loads((folder / "stages" / "student" / "result.json").read_text())["tasks"]["digits"]
    assert not any(key.startswith("test_") for key in stage)  # the test split is looked at once
    patched = ModelDir(folder).load_task("digits")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype("float32")
    np.testing.assert_allclose(fold(patched.model)(images), patched.model(images), rtol=1e-4, atol=1e-5)
    rows = dict(row for _, section in inspection.inspect(folder) for row in section)
    assert rows["live blocks"] == str(entry["live_blocks"])
    assert rows["live parameters"] == f"{entry['live_parameters']:,}"


@pytest.mark.slow
def test_every_term_is_logged_by_name(finished):
    lines = (finished[0] / "stages" / "student" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    assert {"loss_softmax_cross_entropy", "loss_complexity", "loss_block_distillation"} <= steps[-1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".svg", ".png", ".gif"])
def test_it_is_drawn(finished, tmp_path, suffix):
    path = network_drawing.draw([finished[0]], tmp_path / f"net{suffix}")
    head = path.read_bytes()[:400]
    assert {".svg": b"<svg", ".png": b"PNG", ".gif": b"GIF89a"}[suffix] in head or (suffix == ".svg" and b"<?xml" in head)


@pytest.mark.slow
def test_it_goes_on_where_it_stood_and_refuses_other_settings(finished):
    folder, result = finished
    (folder / "result.json").unlink()
    before = {p: p.read_bytes() for p in folder.glob("stages/*/checkpoints/*") if p.is_file()}
    again = nettailor(**settings(folder))
    assert again.summary["tasks"]["digits"]["test_accuracy"] == result.summary["tasks"]["digits"]["test_accuracy"]
    assert {p: p.read_bytes() for p in folder.glob("stages/*/checkpoints/*") if p.is_file()} == before
    with pytest.raises(errors.ConfigError, match="another configuration"):
        nettailor(**settings(folder, threshold=0.3))


def untrained(monkeypatch):
    """Fails where a phase begins: what is refused is refused before."""
    monkeypatch.setattr(method.Stages, "train", lambda *_, **__: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"remove": [3]}, errors.ConfigError, "the backbone has 3 blocks; 3 would leave none, give at most 2"),
        ({"remove": []}, errors.ConfigError, "give numbers of blocks to remove"),
        ({"threshold": 1.0}, errors.ConfigError, r"threshold=1.0\): expected an attention in \[0, 1\)"),
        ({"ranking": "atention"}, errors.ConfigError, "did you mean 'attention'"),
        ({"model_dir": None}, errors.ConfigError, "needs a model_dir"),
        (
            {"task": Task(name="digits", data="embedded/digits", patch="head")},
            errors.ConfigError,
            r"its patch is 'head'; give one such as 'nettailor\(k=3\)\+head'",
        ),
        ({"backbone": lambda: backbones.vgg16_bn()}, errors.PatchError, "no sequence of residual blocks: found a chain"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(tmp_path, monkeypatch, changes, error, message):
    untrained(monkeypatch)
    with pytest.raises(error, match=message):
        nettailor(**settings(tmp_path / "run", **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "embedded/parity"}, errors.DataError, "has 2 labels .*trained on 10"),
        ({"image_size": 32}, errors.ConfigError, "images of 32x32 pixels, its teacher of 16x16"),
        ({}, errors.ConfigError, "its teacher 'digits' has no layer 'stage1_block2_relu'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(finished, tmp_path, changes, error, message):
    teacher = str(finished[0] / "stages" / "teacher" / "tasks" / "digits" / "patch.safetensors")
    given = settings(tmp_path / "run", teacher=teacher)
    given["task"] = dataclasses.replace(given["task"], **changes)
    if not changes:
        given["backbone"] = lambda: backbones.cifar_resnet(depth=14)
    with pytest.raises(error, match=message):
        nettailor(**given)
    assert not list((tmp_path / "run").glob("stages/student/checkpoints/*"))


def test_a_network_is_good_enough_within_half_a_point_or_one_standard_error():
    assert allowance(0.9, 10_000) == 0.005
    assert allowance(0.9, 100) == pytest.approx(0.03)
    candidates = [Candidate(n, accuracy, 100 - n, None) for n, accuracy in ((0, 0.9), (2, 0.88), (4, 0.86))]
    assert method._leanest(candidates, 0.9, 100).removed == 2
    with pytest.warns(errors.PatchWarning, match="no pruned network is within"):
        assert method._leanest(candidates, 0.99, 10_000).removed == 0
