"""Clusters that somebody else starts: processes by hand with TF_CONFIG, and the Slurm script with a stand-in for srun."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from k4p1.cluster.spec import on_this_machine

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["steps = 3", "batch_size = 8", "train.recalibration_batches = 1"]
LIMIT_SECONDS = 200

pytestmark = [pytest.mark.processes, pytest.mark.timeout(2 * LIMIT_SECONDS)]


def environment(**more):
    paths = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT), "PATH": paths, **more}


def start(command, folder, spec):
    arguments = [sys.executable, "-m", "k4p1", command, "--gin_file", "quickstart", "--model_dir", str(folder)]
    arguments += [part for binding in SMALL for part in ("--gin_bindings", binding)]
    given = environment(TF_CONFIG=spec.as_tf_config())
    return subprocess.Popen(arguments, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_processes_by_hand_in_any_order(tmp_path):
    """Server and first worker come before the coordinator, the second worker long after it; all end with the run."""
    folder, spec = tmp_path / "m", on_this_machine(1, 2)
    folder.mkdir()
    processes = {
        "ps": start("join", folder, spec.of("ps", 0)),
        "w0": start("join", folder, spec.of("worker", 0)),
    }
    try:
        time.sleep(3)
        processes["chief"] = start("train", folder, spec)
        line = processes["chief"].stdout.readline()
        while "worker 1" not in line:  # whoever is there by then is not waited for
            assert line, "the coordinator ended"
            line = processes["chief"].stdout.readline()
        assert line.startswith("waiting for ") and f"worker 1 ({spec.jobs['worker'][1]}: nobody listens)" in line
        second = start("train", folder, spec)
        said, _ = second.communicate(timeout=LIMIT_SECONDS)
        assert second.returncode == 1 and "is in use by a coordinator (process " in said
        processes["w1"] = start("join", folder, spec.of("worker", 1))
        said = {name: process.communicate(timeout=LIMIT_SECONDS)[0] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    assert {name: process.returncode for name, process in processes.items()} == dict.fromkeys(processes, 0), said
    assert "waiting for the coordinator (" in said["w0"] and "worker 0: the run is over" in said["w0"]
    tasks = json.loads((folder / "status.json").read_text())["tasks"]
    assert {task: values["done"] for task, values in tasks.items()} == {"digits": 3, "parity": 3}


def test_the_slurm_script(tmp_path):
    """Four tasks on one made-up node; a stand-in for srun starts them as Slurm would."""
    (tmp_path / "bin").mkdir()
    step = "SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_TASKS_PER_NODE=4"
    srun = f"""#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for rank in 0 1 2 3; do {step} SLURM_PROCID=$rank "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || exit 1; done
"""
    for name, text in {"srun": srun, "k4p1": f'#!/bin/sh\nexec "{sys.executable}" -m k4p1 "$@"\n'}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = environment(SLURM_JOB_ID=str(os.getpid()))
    given["PATH"] = f"{tmp_path / 'bin'}:{given['PATH']}"
    given.pop("TF_CONFIG", None)
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), str(tmp_path / "m"), "quickstart", *SMALL]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "m" / "status.json").read_text())
    assert status["state"] == "finished" and set(status["workers"]) == {"0", "1"}
    assert {task: values["done"] for task, values in status["tasks"].items()} == {"digits": 3, "parity": 3}
