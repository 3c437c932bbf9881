"""Clusters that somebody else starts: processes by hand with TF_CONFIG, and the Slurm script with a stand-in for srun."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from k4p1.cluster.spec import from_environment, on_this_machine
from tests.conftest import SHALLOW

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ["steps = 3", "batch_size = 8", "train.recalibration_batches = 1", *SHALLOW]
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
        assert " waiting for " in line and f"worker 1 ({spec.jobs['worker'][1]}: nobody listens)" in line
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


def test_the_slurm_script_submits_itself_and_starts_two_components(tmp_path, monkeypatch):
    """Stand-ins for sbatch and srun start what Slurm would; one for k4p1 says what it is given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.gin").write_text("include 'quickstart.gin'\nbatch_size = 8\n")
    sbatch = f"""#!/bin/bash
printf '%s\\n' "$@" > {tmp_path}/submitted
rm {tmp_path}/own/mine.gin
while [[ "$1" != *.sbatch ]]; do shift; done
SLURM_JOB_ID={os.getpid()} SLURM_HET_SIZE=2 exec bash "$@"
"""
    srun = """#!/bin/bash
while [[ "$1" == --* ]]; do case $1 in --het-group=*) group=${1#*=};; --label) label=1;; esac; shift; done
for rank in 0 1; do
  if [ -n "$label" ]; then echo "$rank: 127.0.0.1"; else SLURM_PROCID=$rank "$@" & pids="$pids $!"; fi
done
for pid in $pids; do wait $pid || exit 1; done
"""
    k4p1 = f"""#!/bin/bash
if [ "$1" = configs ]; then exec "{sys.executable}" -m k4p1 "$@"; fi
printf '%s\\n' "$TF_CONFIG" "$PWD" "$SET_UP" "$@" > {tmp_path}/started.$$
"""
    programs = {"sbatch": sbatch, "srun": srun, "k4p1": k4p1}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = environment(K4P1_GPUS="1", K4P1_PARTITION="gpu", K4P1_TIME="1:00:00", K4P1_SETUP="export SET_UP=1")
    given["PATH"] = f"{tmp_path / 'bin'}:{given['PATH']}"
    for name in ("TF_CONFIG", "SLURM_JOB_ID"):
        given.pop(name, None)
    folder = tmp_path / "m"
    bindings = ["steps = 3", "train.recalibration_batches = 1"]
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), str(folder), str(tmp_path / "own" / "mine.gin"), *bindings]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    submitted = (tmp_path / "submitted").read_text().split("\n")
    servers, workers = submitted[: submitted.index(":")], submitted[submitted.index(":") :]
    assert {"--time=1:00:00", "--ntasks=2", "--partition=gpu", f"--output={folder}/logs/slurm-%j.out"} <= set(servers)
    assert {"--time=1:00:00", "--ntasks=2", "--partition=gpu", "--gpus-per-task=1"} <= set(workers)
    assert not any(option.startswith("--gpus") for option in servers)
    found = {}
    for path in tmp_path.glob("started.*"):
        config, where, set_up, *arguments = path.read_text().splitlines()
        monkeypatch.setenv("TF_CONFIG", config)
        role = from_environment()
        found[role.job, role.index] = (role.address, arguments[0])
        assert where == f"{folder}/gin" and set_up == "1"
        assert arguments[1:] == [
            f"--gin_file={folder}/gin/mine.gin",
            f"--model_dir={folder}",
            *(f"--gin_bindings={binding}" for binding in bindings),
        ]
    assert {role: command for role, (_, command) in found.items()} == {
        ("chief", 0): "train",
        ("ps", 0): "join",
        ("worker", 0): "join",
        ("worker", 1): "join",
    }
    assert len({address for address, _ in found.values()}) == 4  # a port each, though all are on one node
    assert (folder / "gin" / "quickstart.gin").is_file()


def test_the_slurm_script_submits_nothing_that_cannot_run(tmp_path):
    (tmp_path / "bin").mkdir()
    programs = {
        "sbatch": f"#!/bin/sh\ntouch {tmp_path}/submitted\n",
        "k4p1": f'#!/bin/sh\nexec "{sys.executable}" -m k4p1 "$@"\n',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    given = environment()
    given["PATH"] = f"{tmp_path / 'bin'}:{given['PATH']}"
    given.pop("SLURM_JOB_ID", None)
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), str(tmp_path / "m"), "quickstart", "step = 3"]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 1 and "unused macro 'step'" in done.stderr
    assert not (tmp_path / "submitted").exists() and not (tmp_path / "m").exists()
