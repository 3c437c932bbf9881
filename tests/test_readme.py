"""Every command and the example of the README, in small."""

import pathlib
import re
import shlex

import pytest

import k4p1
from k4p1 import backbones
from k4p1.cli import gin_config, main
from k4p1.patches.apply import apply_patches
from k4p1.patches.patch_file import save_patch
from tests.conftest import SHALLOW, small_model

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
OURS = [shlex.split(line)[1:] for line in SHELL if line.startswith("k4p1 ")]
RUNS = ("train", "decathlon", "packnet")


def small(command, is_dry):
    """Bindings that make a run short."""
    shallow = ["depth = 8"] if command != "train" else [] if is_dry else SHALLOW
    return [
        part
        for b in ("steps = 2", "batch_size = 8", f"{command}.recalibration_batches = 1", *shallow)
        for part in ("--gin_bindings", b)
    ]


def test_the_python_example_runs(tmp_path, capsys, monkeypatch):
    example, _ = (block for language, block in BLOCKS if language == "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    short = example.replace("/tmp/k4p1", str(tmp_path)).replace("steps=100", "steps=2").replace("epochs=2", "steps=2")
    monkeypatch.setattr(k4p1, "mobilenet_v2", lambda width: backbones.from_model(small_model(), name="small"))
    exec(compile(short, "README.md", "exec"), {})
    assert (tmp_path / "served" / "digits" / "1" / "saved_model.pb").is_file()
    assert "input_scaling" in capsys.readouterr().out


def test_the_example_of_a_patch_set_runs(tmp_path, monkeypatch, small_backbone, images):
    _, example = (block for language, block in BLOCKS if language == "python")
    monkeypatch.chdir(tmp_path)
    backbones.save(small_backbone, "backbone.safetensors")
    for name in ("a", "b"):
        patched = apply_patches(small_backbone, "scale_bias+head", classes=2, image_size=16, name=name)
        save_patch(f"{name}.safetensors", patched, small_backbone, task=name, labels=["x", "y"])
    found = {"k4p1": k4p1, "images": images}
    exec(compile(example, "README.md", "exec"), found)
    assert found["logits"].shape == (4, 2) and found["patches"].names == ["a", "both"]


def test_the_commands_run(tmp_path, capsys):
    ran = []
    for arguments in OURS:
        arguments = [a.replace("/tmp/k4p1", str(tmp_path)) for a in arguments]
        if arguments[0] in ("finetune", "predict"):
            continue  # want data and weights of the reader's own
        if arguments[0] in RUNS:
            arguments += small(arguments[0], "--dry_run" in arguments)
        if arguments[0] == "nettailor":
            short = [f"{phase}_epochs = 1" for phase in ("teacher", "student", "retrain")]
            for binding in ("depth = 8", "image_size = 16", "remove = [1]", "threshold = 0.0", *short):
                arguments += ["--gin_bindings", binding]
        assert main.main(arguments) == 0, (arguments, capsys.readouterr().err)
        ran.append(arguments[0])
    assert set(ran) == set(main.COMMANDS) - {"finetune", "predict", "join", "method_table", "mask_rates"}


@pytest.mark.parametrize("arguments", [a for a in OURS if a[0] == "finetune"], ids=lambda a: " ".join(a)[:60])
def test_the_bindings_of_commands_that_want_data_are_known(arguments):
    assert gin_config.load(["finetune"], [arguments[i + 1] for i, a in enumerate(arguments) if a == "--gin_bindings"])


def test_scripts_and_linked_files_exist():
    for script in re.findall(r"^bash (\S+)", README, re.MULTILINE):
        assert (ROOT / script).is_file()
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(
        r"`((?:docs|k4p1|tests|benchmarks|launch|gin)/[\w/.]+)`", README + (ROOT / "WORKSPACE.md").read_text()
    ):
        assert (ROOT / name).exists(), name
