"""The comparison of methods: what a run measures, which runs are repeated, the tables, mistakes."""

import itertools
import json
import pathlib
import shlex
import shutil
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

import k4p1
from k4p1 import backbones, errors
from k4p1.cli import gin_config, main
from k4p1.studies import mask_rates
from k4p1.studies import method_table as study
from tests.data.test_tfds_source import prepare

pytestmark = pytest.mark.slow

LABELS = ("dark", "grey", "light")
FRESH = {"tasks": ["signdigits"], "methods": ["lora"], "quiet": True}


def result(method="head", task="gtsrb", accuracy=0.5, **changes):
    """A line of a results file, as earlier versions wrote it."""
    line = {
        "task": task,
        "method": method,
        "seed": 0,
        "steps": study.STEPS[task],
        "rate": study.METHODS[method].learning_rate,
    }
    return {**line, "test_accuracy": accuracy, "private_trained": 1234, "patch_bytes": 56789, **changes}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepared `signdigits` and `dtd10` of twenty small images."""
    root = tmp_path_factory.mktemp("prepared")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=LABELS),
        }
    )
    examples = [{"image": np.full((8, 8, 3), 12 * i, np.uint8), "label": LABELS[i // 7]} for i in range(20)]
    made = prepare(root / "made", features, examples)
    for task in ("signdigits", "dtd10"):
        shutil.copytree(made, root / task / "1.0.0")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A backbone file of the smallest CIFAR ResNet."""
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    backbones.save(backbones.cifar_resnet(depth=8), path)
    return path


@pytest.fixture
def finetuned(monkeypatch, small_backbone):
    """Stands for `finetune`; the arguments of its calls."""
    calls = []

    def finetune(**arguments):
        calls.append(arguments)
        entry = {"steps": arguments["task"].steps, "private_trained": 7, "patch_bytes": 8}
        entry |= {"validation_accuracy": 0.25, "test_accuracy": 0.75}
        return types.SimpleNamespace(summary={"tasks": {arguments["task"].name: entry}}, backbone=small_backbone)

    monkeypatch.setattr(study, "finetune", finetune)
    return calls


def test_the_command_measures_and_prints(data_dir, weights, tmp_path, capsys):
    file = tmp_path / "new" / "results.jsonl"
    flags = ["--results_file", str(file), "--data_dir", str(data_dir), "--weights", str(weights), "--depth", "8"]
    flags += ["--tasks", "signdigits", "--methods", "head", "--methods", "mask, BN frozen", "--steps_scale", "0.005"]
    assert main.main(["method_table", *flags]) == 0
    head, mask = study.read_results(file)
    assert (head["method"], head["spec"], head["rate"], head["mask_rate"]) == ("head", "head", 0.01, None)
    assert (mask["method"], mask["spec"], mask["rate"], mask["mask_rate"]) == ("mask, BN frozen", "mask+head", 0.01, 1e-4)
    fingerprint = backbones.load(weights).fingerprint()
    for line in (head, mask):
        assert (line["task"], line["seed"], line["steps"]) == ("signdigits", 0, 2)
        assert fingerprint.startswith(line["backbone"]) and line["backbone"]
        assert 0 <= line["validation_accuracy"] <= 1 and 0 <= line["test_accuracy"] <= 1
    assert head["private_trained"] == 64 * len(LABELS) + len(LABELS)
    kernels = sum(v.size for key, v in backbones.load(weights).tensors().items() if key.endswith("/kernel"))
    assert mask["private_trained"] == head["private_trained"] + kernels
    assert kernels / 8 < mask["patch_bytes"] - head["patch_bytes"] < kernels  # a bit per weight, and the header
    out = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("task ")]  # of random statistics
    assert out[0].startswith("run 1 of 2: signdigits, head, seed 0, rate 0.01: validation ")
    assert out[2] == "other lengths:" and out[5].startswith(f"| head | {100 * head['test_accuracy']:.1f} | 195 | ")

    assert main.main(["method_table", *flags]) == 0  # nothing is left to measure
    assert capsys.readouterr().out.splitlines() == out[2:]
    assert study.read_results(file) == [head, mask]


def test_runs_in_the_file_are_not_repeated(data_dir, tmp_path, finetuned, small_backbone):
    how = {"backbone": lambda: small_backbone, "data_dir": data_dir, "quiet": True, "steps_scale": 0.01}
    how |= {"results_file": write(tmp_path / "results.jsonl", result("mask, BN private", "signdigits", steps=4))}

    def ran(**changes):
        finetuned.clear()
        study.method_table(**{**how, "tasks": ["signdigits"], "methods": ["mask, BN private"], **changes})
        return [(call["task"].name, str(call["task"].patch), call["seed"]) for call in finetuned]

    masks = ("signdigits", "mask+scale_bias+head", 0)
    assert ran() == []
    assert ran(methods=["mask, BN private", "lora"]) == [("signdigits", "lora+scale_bias+head", 0)]
    assert ran(tasks=["signdigits", "dtd10"], methods=["lora"]) == [("dtd10", "lora+scale_bias+head", 0)]
    assert ran(seeds=[0, 5]) == [(*masks[:2], 5)]
    assert ran(rates=[0.01, 0.5]) == [masks]
    assert ran(mask_rate=0.25) == [masks]
    assert ran(steps_scale=0.02) == [masks]
    assert ran(seeds=[0, 5], rates=[0.01]) == ran(mask_rate=0.25) == []
    assert len(study.read_results(how["results_file"])) == 7


def test_every_method_trains_as_it_says(data_dir, tmp_path, finetuned, small_backbone):
    how = {"backbone": lambda: small_backbone, "data_dir": data_dir, "results_file": tmp_path / "results.jsonl"}
    study.method_table(**how, tasks=["dtd10"], methods=list(study.METHODS), quiet=True)
    trained = {str(call["task"].patch): (call["task"], call["optimizer"]) for call in finetuned}
    assert len(trained) == len(study.METHODS) == 14
    for task, optimizer in trained.values():
        assert (task.image_size, task.batch_size, task.steps, task.validation_fraction) == (32, 32, 400, 0.1)
        assert optimizer.learning_rate == (1e-3 if str(task.patch) == "full" else 1e-2)
        assert task.augment == ("" if str(task.patch) == "head" else "shift(pixels=4)")
    scores = {patch: optimizer.rules for patch, (_, optimizer) in trained.items() if optimizer.rules}
    assert scores == {
        "mask+head": {"mask": {"learning_rate": 1e-4}},
        "mask+scale_bias+head": {"mask": {"learning_rate": 1e-3}},
    }
    assert finetuned[0]["evaluate_every"] == 100


def test_one_file_holds_results_on_one_backbone(data_dir, tmp_path, finetuned, small_backbone, plain_backbone):
    how = {**FRESH, "data_dir": data_dir, "results_file": tmp_path / "results.jsonl"}
    study.method_table(backbone=lambda: small_backbone, **how)
    study.method_table(backbone=lambda: small_backbone, **{**how, "seeds": [1]})
    with pytest.raises(errors.ConfigError, match="holds results on another backbone"):
        study.method_table(backbone=lambda: plain_backbone, **{**how, "seeds": [2]})
    assert len(finetuned) == 2


def test_tables_by_length_and_rate():
    lines = [
        result("lora", "gtsrb", 0.9),
        result("head", "gtsrb", 0.25, seed=0),
        result("head", "gtsrb", 0.75, seed=1),
        result("head", "dtd10", 0.125, private_trained=9),
        result("mask, BN frozen", "dtd10", 1.0),
        result("lora", "gtsrb", 0.1, rate=0.003),
        result("mask, BN frozen", "dtd10", 0.2, mask_rate=3e-4),
        result("head", "gtsrb", 0.3, steps=100),
        result("head", "gtsrb", 0.4, steps=200),
    ]
    assert list(study.markdown(lines)) == [
        "full length:",
        "| method | gtsrb, 1,000 steps | dtd10, 400 steps | trained, gtsrb | bytes, gtsrb |",
        "|---|---|---|---|---|",
        "| head | 50.0 (25.0-75.0) | 12.5 | 1,234 | 56,789 |",
        "| mask, BN frozen |  | 100.0 |  |  |",
        "| mask, BN frozen, mask rate 0.0003 |  | 20.0 |  |  |",
        "| lora, rate 0.003 | 10.0 |  | 1,234 | 56,789 |",
        "| lora | 90.0 |  | 1,234 | 56,789 |",
        "other lengths:",
        "| method | gtsrb, 200 steps | gtsrb, 100 steps | trained, gtsrb | bytes, gtsrb |",
        "|---|---|---|---|---|",
        "| head | 40.0 | 30.0 | 1,234 | 56,789 |",
    ]


def test_table_only_prints(tmp_path, finetuned, capsys):
    file = write(tmp_path / "results.jsonl", result("lora", accuracy=0.5))
    before = file.read_bytes()
    assert main.main(["method_table", "--results_file", str(file), "--table"]) == 0
    assert "| lora | 50.0 | 1,234 | 56,789 |" in capsys.readouterr().out
    assert (file.read_bytes(), finetuned) == (before, [])


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--tasks", "gtsbr"], 1, "unknown task 'gtsbr'; did you mean 'gtsrb'?"),
        (["--methods", "paralel_adapter"], 1, "unknown method 'paralel_adapter'; did you mean 'parallel_adapter'?"),
        (["--seeds", "0,one"], 1, "--seeds 0,one: expected integers separated by commas"),
        (["--rates", "0.01,0"], 1, "learning_rate=0.0; expected a positive number"),
        (["--mask_rate", "-1"], 1, "learning_rate=-1.0; expected a positive number"),
        (["--steps_scale", "0"], 1, "steps_scale=0.0; expected a positive number"),
        (["--tasks", "signdigits,omniglot8"], 2, "no prepared TFDS directory"),
        (["--tasks", "signdigits", "--weights", "nowhere.npz"], 2, "no weight file nowhere.npz"),
        (["--table"], 2, "no results in"),
    ],
)
def test_mistakes_are_one_line(flags, code, message, data_dir, weights, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    given = ["--results_file", str(file), "--data_dir", str(data_dir), "--weights", str(weights), "--depth", "8"]
    assert main.main(["method_table", *given, *flags]) == code
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1
    assert not captured.out and not (file.exists() and file.read_text())


@pytest.mark.parametrize("flag", ["--data_dir", "--weights"])
def test_measuring_needs_data_and_weights(flag, tmp_path, capsys):
    given = {"--results_file": str(tmp_path / "results.jsonl"), "--data_dir": str(tmp_path), "--weights": "weights.npz"}
    given.pop(flag)
    assert main.main(["method_table", *(part for pair in given.items() for part in pair)]) == 1
    assert f"needs {flag}, or --table" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ['{"task": "gtsrb", "met', "[1]", json.dumps(result(task="gtsrb") | {"method": "masks"}), json.dumps({"task": "gtsrb"})],
)
def test_a_damaged_file_is_named_with_its_line(line, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(f"{json.dumps(result())}\n{line}\n")
    with pytest.raises(errors.ArtifactError, match=r"results\.jsonl, line 2: expected a result"):
        study.read_results(file)


def test_a_file_that_cannot_be_written_stops_before_the_first_run(data_dir, tmp_path, finetuned, small_backbone):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="a part of the path is a file"):
        study.method_table(
            backbone=lambda: small_backbone, data_dir=data_dir, results_file=tmp_path / "file" / "results.jsonl", **FRESH
        )
    assert finetuned == []


def test_the_commands_of_the_documentation_are_understood(monkeypatch):
    page = pathlib.Path(k4p1.__file__).parents[1] / "docs" / "methods.md"
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    calls = []
    monkeypatch.setattr(study, "method_table", lambda **arguments: calls.append(arguments) or [])
    monkeypatch.setattr(mask_rates, "mask_rates", lambda **arguments: calls.append(arguments) or [])
    for line in lines:
        if line.startswith(("k4p1 method_table ", "k4p1 mask_rates ")):
            assert main.main(shlex.split(line)[1:]) == 0, line
        elif line.startswith("k4p1 "):
            words = shlex.split(line)
            files, bindings = ([b for a, b in itertools.pairwise(words) if a == f] for f in ("--gin_file", "--gin_bindings"))
            assert gin_config.load(files or [words[1]], bindings), line
    everything, three_seeds, one_score_rate, other_rates, masks = calls
    assert (one_score_rate["methods"], one_score_rate["mask_rate"]) == (["mask, BN private"], 1e-4)
    assert (everything["tasks"], everything["methods"]) == (tuple(study.STEPS), tuple(study.METHODS)[:9])
    assert (three_seeds["tasks"], three_seeds["seeds"], three_seeds["steps_scale"]) == (["signdigits"], [1, 2, 3], 0.25)
    assert (other_rates["methods"], other_rates["rates"]) == (["series_adapter", "full"], [0.003])
    assert (masks["data"], masks["rates"], masks["steps"]) == ("DIR/signdigits/1.0.0", [1e-4, 3e-4], 150)
