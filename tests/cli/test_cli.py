"""The command line, in this process: help, mistakes, and one small real run with everything that follows it."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

import keras
import pytest
import tensorflow as tf

import gin
import k4p1
from k4p1 import backbones
from k4p1.cli import gin_files, main
from k4p1.files import tensor_file

ROOT = pathlib.Path(k4p1.__file__).parents[1]


def one_convolution():
    """The smallest backbone."""
    image = keras.Input((None, None, 3))
    features = keras.layers.Conv2D(8, 3, strides=2, name="stem")(image)
    return backbones.from_model(keras.Model(image, features), name="one_convolution", scaling="symmetric")


gin.external_configurable(one_convolution, module="tests.cli")

QUICK = [
    *("--gin_bindings", "steps = 2"),
    *("--gin_bindings", "batch_size = 16"),
    *("--gin_bindings", "train.evaluate_every = 4"),
    *("--gin_bindings", "train.recalibration_batches = 2"),
]
"""Makes the quickstart a run of seconds."""

HEAD_ONLY = [
    *("--gin_bindings", "finetune.backbone = @one_convolution"),
    *("--gin_bindings", "data = 'embedded/parity'"),
    *("--gin_bindings", "image_size = 32"),
    *("--gin_bindings", "patch = 'head'"),
    *("--gin_bindings", "augment = ''"),
    *("--gin_bindings", "epochs = 0.1"),
]
"""A fine-tuning of seconds that computes features once; nobody reads the settings of MobileNetV2."""


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def call(*arguments):
    """Runs a command that must succeed, and returns what it printed on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main([str(argument) for argument in arguments])
    assert code == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a quickstart run of two steps a task."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    call("train", "--gin_file", "quickstart", "--model_dir", folder, *QUICK)
    return folder


@pytest.fixture(scope="module")
def result(quickstart):
    return json.loads((quickstart / "result.json").read_text())


class TestHelp:
    def test_overview_names_every_command(self, capsys):
        assert main.main(["--help"]) == 0
        out = capsys.readouterr().out
        for name, described in main.COMMANDS.items():
            assert f"  {name} " in out
            assert described.summary in out

    def test_no_command_shows_the_overview_and_fails(self, capsys):
        assert main.main([]) == 1
        assert "usage: k4p1 COMMAND" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "flags"),
        {
            "train": ("--gin_file", "--gin_bindings", "--model_dir", "--[no]dry_run", "--local_cluster", "--slurm"),
            "finetune": ("--gin_file", "--gin_bindings", "--model_dir", "--[no]dry_run", "--[no]resume", "--debug"),
            "evaluate": ("--model_dir", "--task", "--split"),
            "predict": ("--model_dir", "--task", "--top"),
            "export": ("--model_dir", "--task", "--export_dir"),
            "inspect": ("PATH",),
            "configs": ("usage: k4p1 configs",),
            "status": ("MODEL_DIR",),
            "join": ("--gin_file", "--model_dir"),
            "manifest": ("--image", "--ps", "--workers", "--gpus", "--claim"),
        }.items(),
    )
    def test_every_command_shows_its_flags(self, name, flags, capsys):
        assert main.main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert main.COMMANDS[name].summary in out
        for flag in flags:
            assert flag in out

    def test_version(self, capsys):
        assert main.main(["--version"]) == 0
        assert capsys.readouterr().out == f"k4p1 {k4p1.__version__}\n"

    @pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["trian"], ["status", "nowhere"]])
    def test_needs_no_tensorflow(self, arguments):
        script = (
            f"import sys; from k4p1.cli import main; main.main({arguments!r}); "
            "print(sorted({'tensorflow', 'keras', 'gin'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr

    def test_configs_lists_every_shipped_file(self, capsys):
        assert main.main(["configs"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(gin_files.shipped())


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["trian"], "unknown command 'trian'; did you mean 'train'"),
            (["evalute", "--model_dir", "x"], "did you mean 'evaluate'"),
            (["train", "--model_dri", "x"], "Unknown command line flag 'model_dri'. Did you mean: model_dir ?"),
            (["train", "--steps=3"], "Unknown command line flag 'steps'"),
            (["train", "extra"], "k4p1 train takes no argument 'extra'"),
            (["evaluate"], "model_dir"),
            (["export", "--model_dir", "x"], "export_dir"),
            (["predict", "--model_dir", "x"], "k4p1 predict needs IMAGE"),
            (["predict", "--model_dir", "x", "--top", "0", "a.jpg"], "top"),
            (["inspect"], "k4p1 inspect needs PATH"),
        ],
    )
    def test_one_line_and_exit_code_1(self, arguments, message, capsys):
        assert main.main(arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1
        assert captured.err.startswith("k4p1: ")
        assert not captured.out

    def test_debug_shows_where(self):
        with pytest.raises(k4p1.errors.ConfigError):
            main.main(["trian", "--debug"])

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (KeyboardInterrupt(), 130, "k4p1: interrupted"),
            (k4p1.errors.Preempted("stopped; saved at step 3"), 75, "k4p1: stopped; saved at step 3"),
            (k4p1.errors.Interrupted("stopped"), 130, "k4p1: stopped"),
            (k4p1.errors.StorageError("disk full"), 2, "k4p1: disk full"),
            (k4p1.errors.DivergedError("the loss is nan"), 1, "k4p1: the loss is nan"),
            (RuntimeError("odd\nand long"), 1, "k4p1: RuntimeError: odd (--debug shows where)"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
    )
    def test_exit_codes(self, error, code, line, monkeypatch, capsys):
        def fail():
            raise error

        monkeypatch.setattr(gin_files, "shipped", fail)
        assert main.main(["configs"]) == code
        assert capsys.readouterr().err == f"{line}\n"


def test_a_local_cluster_keeps_the_command_that_was_typed(monkeypatch, tmp_path):
    """The coordinator is another process, with other arguments."""
    from k4p1.cluster import local

    told = {}
    monkeypatch.setattr(local, "launch", lambda *_, **__: told.update(os.environ) or 0)
    monkeypatch.setattr(sys, "argv", ["k4p1", "train", "--local_cluster", "ps:1,workers:2", "--model_dir", "a b"])
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert main.main(sys.argv[1:]) == 0
    assert told["K4P1_COMMAND_LINE"] == "k4p1 train --local_cluster ps:1,workers:2 --model_dir 'a b'"
    assert "K4P1_COMMAND_LINE" not in os.environ


@pytest.mark.slow
class TestTrain:
    def test_writes_what_the_run_was(self, quickstart):
        for name in ("config.gin", "operative_config.gin", "command.txt", "run.json", "metrics.jsonl"):
            assert (quickstart / name).stat().st_size, name
        assert "steps = 2\n" in (quickstart / "config.gin").read_text()
        assert "application" not in (quickstart / "operative_config.gin").read_text()
        assert "Task.batch_size = " in (quickstart / "operative_config.gin").read_text()
        assert {"k4p1", "tensorflow", "keras"} <= set(json.loads((quickstart / "run.json").read_text())["versions"])

    def test_writes_backbone_patches_labels_and_checkpoints(self, quickstart):
        assert (quickstart / "backbone" / "backbone.safetensors").is_file()
        assert (quickstart / "tasks" / "digits" / "labels.txt").read_text() == "".join(f"{i}\n" for i in range(10))
        assert (quickstart / "tasks" / "parity" / "labels.txt").read_text() == "even\nodd\n"
        assert (quickstart / "checkpoints" / "step_00000004.safetensors").is_file()
        for kind in ("train", "eval"):
            for task in ("digits", "parity"):
                assert list((quickstart / kind / task).glob("events.out.tfevents.*"))
        assert not list(quickstart.rglob("*.partial"))

    def test_writes_the_result(self, quickstart, result):
        assert result["shared_parameters"] == 382_048
        assert list(result["tasks"]) == ["digits", "parity"]
        for name, task in result["tasks"].items():
            assert task["steps"] == 2
            assert task["patch_bytes"] == (quickstart / "tasks" / name / "patch.safetensors").stat().st_size
            assert 0 <= task["validation_accuracy"] <= 1
            assert 0 <= task["test_accuracy"] <= 1
        batch_normalisation = 14_080
        assert result["tasks"]["digits"]["private_parameters"] == batch_normalisation + 1280 * 10 + 10
        assert result["tasks"]["parity"]["private_parameters"] == batch_normalisation + 1280 * 2 + 2

    def test_started_again_it_goes_on_where_it_was(self, quickstart, result):
        patch = quickstart / "tasks" / "parity" / "patch.safetensors"
        content = tensor_file.read_header(patch)["content_hash"]
        _, err = call("train", "--gin_file", "quickstart", "--model_dir", quickstart, *QUICK)
        assert "resuming from the checkpoint at digits 2/2, parity 2/2" in err
        assert json.loads((quickstart / "result.json").read_text()) == result
        assert tensor_file.read_header(patch)["content_hash"] == content

    def test_another_configuration_is_refused(self, quickstart, capsys):
        before = (quickstart / "config.gin").read_bytes(), (quickstart / "run.json").read_bytes()
        arguments = ["--model_dir", str(quickstart), *QUICK, "--gin_bindings", "learning_rate = 0.5"]
        assert main.main(["train", *arguments]) == 1
        line = capsys.readouterr().err
        assert "holds a run with another configuration (optimizer: " in line
        assert len(line.splitlines()) == 1
        assert ((quickstart / "config.gin").read_bytes(), (quickstart / "run.json").read_bytes()) == before


@pytest.mark.slow
class TestAfterTraining:
    def test_evaluate_repeats_the_test_accuracy(self, quickstart, result):
        out, _ = call("evaluate", "--model_dir", quickstart, "--task", "parity")
        assert f"accuracy {result['tasks']['parity']['test_accuracy']:.4f}" in out
        assert "359" in out
        assert "digits" not in out

    def test_predict_shows_labels_and_probabilities(self, quickstart, tmp_path):
        path = tmp_path / "image.png"
        path.write_bytes(tf.io.encode_png(tf.zeros([8, 8, 1], tf.uint8)).numpy())
        out, _ = call("predict", "--model_dir", quickstart, "--task", "parity", "--top", 2, path)
        (row,) = [line for line in out.splitlines() if "even" in line]
        shown = [float(word.strip(",")) for word in row.split() if word.startswith(("0.", "1."))]
        assert "odd" in row
        assert sum(shown) == pytest.approx(1, abs=2e-3)

    def test_predict_wants_a_task_where_there_are_several(self, quickstart, capsys):
        assert main.main(["predict", "--model_dir", str(quickstart), "image.png"]) == 1
        assert "say which with --task: digits, parity" in capsys.readouterr().err

    def test_export_writes_a_saved_model_that_inspect_describes(self, quickstart, tmp_path):
        out, _ = call("export", "--model_dir", quickstart, "--task", "parity", "--export_dir", tmp_path / "export")
        assert "largest difference of the outputs on a probe batch: " in out
        assert [path.name for path in (tmp_path / "export").iterdir()] == ["parity"]
        assert (tmp_path / "export" / "parity" / "1" / "saved_model.pb").is_file()
        out, _ = call("inspect", tmp_path / "export")
        assert "signature serving_default" in out
        assert "probabilities" in out
        assert "even, odd" in out

    def test_inspect_a_run(self, quickstart):
        out, _ = call("inspect", quickstart)
        assert "finished               yes" in out
        assert "step_00000004.safetensors" in out
        fingerprints = [line.split()[-1] for line in out.splitlines() if "fingerprint" in line]
        assert len(fingerprints) == 3  # the backbone and two patches of it
        assert len(set(fingerprints)) == 1

    def test_inspect_files(self, quickstart):
        patch, _ = call("inspect", quickstart / "tasks" / "digits" / "patch.safetensors")
        assert "private parameters     26,890" in patch
        assert "private statistics     14,080" in patch
        assert "statistics=private" in patch
        checkpoint, _ = call("inspect", quickstart / "checkpoints" / "step_00000004.safetensors")
        assert "ticket/digits          2" in checkpoint


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The folder of a head-only fine-tuning, and what it printed."""
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    return folder, *call("finetune", "--gin_file", "finetune", "--model_dir", folder, *HEAD_ONLY)


class TestFinetune:
    @pytest.mark.slow
    def test_computes_features_once(self, finetuned):
        folder, _, err = finetuned
        assert "only the head trains: features are computed once" in err
        task = json.loads((folder / "result.json").read_text())["tasks"]["parity"]
        assert task["private_parameters"] == 8 * 2 + 2

    def test_names_unused_bindings(self, finetuned):
        warned = [line.split("'")[1] for line in finetuned[2].splitlines() if "unused binding" in line]
        assert warned == ["mobilenet_v2.weights", "mobilenet_v2.width"]

    @pytest.mark.slow
    def test_noresume_starts_anew_and_puts_the_checkpoints_aside(self, finetuned):
        folder = finetuned[0]
        before = json.loads((folder / "run.json").read_text())["config_hash"]
        arguments = ["--model_dir", folder, *HEAD_ONLY, "--gin_bindings", "seed = 5", "--noresume"]
        _, err = call("finetune", *arguments)
        assert "resuming from" not in err
        assert json.loads((folder / "run.json").read_text())["config_hash"] != before
        (aside,) = folder.glob("checkpoints.*")
        assert list(aside.glob("step_*.safetensors"))
        assert "seed = 5" in (folder / "config.gin").read_text()
