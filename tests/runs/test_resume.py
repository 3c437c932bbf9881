"""A run that is killed with SIGKILL and started again ends like one that was never broken."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from k4p1.files import tensor_file
from tests.conftest import SHALLOW

pytestmark = pytest.mark.processes

BINDINGS = [
    "steps = 8",
    "batch_size = 4",
    "train.checkpoint_every = 2",
    "train.evaluate_every = 8",
    "train.recalibration_batches = 2",
    *SHALLOW,
]
LIMIT_SECONDS = 240


def start(folder: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "k4p1", "train", "--gin_file", "quickstart", "--model_dir", str(folder)]
    command += [argument for binding in BINDINGS for argument in ("--gin_bindings", binding)]
    one_thread = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.Popen(command, env={**os.environ, **one_thread}, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(folder: pathlib.Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not list(folder.glob("checkpoints/step_*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_and_terminated_runs_resume_bit_equal(tmp_path):
    unbroken = start(tmp_path / "unbroken")
    _, printed = unbroken.communicate(timeout=LIMIT_SECONDS)
    assert unbroken.returncode == 0, printed

    broken = tmp_path / "broken"
    killed = start(broken)
    wait_for_checkpoint(broken, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (broken / "result.json").exists()
    resumed = start(broken)
    _, printed = resumed.communicate(timeout=LIMIT_SECONDS)
    assert resumed.returncode == 0, printed
    assert "resuming from the checkpoint" in printed

    for name in ("backbone/backbone", "tasks/digits/patch", "tasks/parity/patch"):
        headers = [tensor_file.read_header(tmp_path / run / f"{name}.safetensors") for run in ("unbroken", "broken")]
        assert headers[0]["content_hash"] == headers[1]["content_hash"], name
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("unbroken", "broken")]
    assert results[0] == results[1]


def test_sigterm_saves_and_exits_75(tmp_path):
    process = start(tmp_path)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75, printed
    assert printed.strip().splitlines()[-1].startswith("k4p1: asked to stop (SIGTERM); saved at step")
