"""Kills workers of a running cluster and compares with a run that nobody disturbs.

    python benchmarks/chaos.py [--kills 20] [--steps 300] [--folder runs/chaos]

Four tasks on embedded digits, one parameter server, four workers, all processes on this machine. SIGKILL goes to one worker
after the other, evenly spread over the steps of the run, chosen at random (seed 0). The last line is one JSON object: what
became of every task.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from k4p1.cli import gin_files

WORKERS = 4
GIN = """
include '{quickstart}'
train.tasks = [@digits/Task(), @parity/Task(), @digits40/Task(), @parity40/Task()]
digits40/Task.name = 'digits40'
digits40/Task.data = 'embedded/digits'
digits40/Task.image_size = 40
parity40/Task.name = 'parity40'
parity40/Task.data = 'embedded/parity'
parity40/Task.image_size = 40
"""


def start(folder, gin_file, steps):
    """The command line of the run."""
    command = [sys.executable, "-m", "k4p1", "train", "--gin_file", str(gin_file), "--model_dir", str(folder)]
    command += ["--local_cluster", f"ps:1,workers:{WORKERS}", "--gin_bindings", f"steps = {steps}"]
    return subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"})


def read_json(path):
    """A JSON file, or nothing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def steps_done(folder):
    """Steps of all tasks together, as the run last said."""
    return sum(task.get("done", 0) for task in read_json(folder / "status.json").get("tasks", {}).values())


def worker_process(folder, worker):
    """The process of a worker that serves, or None while it is being started again."""
    said = re.findall(r"\(process (\d+)\)", (folder / "logs" / f"worker_{worker}.log").read_text())
    alive = said and pathlib.Path(f"/proc/{said[-1]}/cmdline").exists()
    return int(said[-1]) if alive else None


def disturb(process, folder, kills, total):
    """Kills workers until the run ends; returns how many."""
    choose, done, last = random.Random(0), 0, {}
    while process.poll() is None:
        time.sleep(0.05)
        if done == kills or steps_done(folder) < total * (done + 1) / (kills + 1):
            continue
        worker = choose.randrange(WORKERS)
        pid = worker_process(folder, worker)
        state = read_json(folder / "status.json").get("workers", {}).get(str(worker), {}).get("state")
        if pid is None or pid == last.get(worker) or state == "lost":
            continue
        os.kill(pid, signal.SIGKILL)
        last[worker], done = pid, done + 1
        print(f"kill {done}: worker {worker} at {steps_done(folder)} of {total} steps", flush=True)
    return done


def main():
    """Runs both and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/chaos"))
    a = parser.parse_args()
    shutil.rmtree(a.folder, ignore_errors=True)
    a.folder.mkdir(parents=True)
    gin_file = a.folder / "four_tasks.gin"
    gin_file.write_text(GIN.format(quickstart=gin_files.find("quickstart")))
    results, seconds, kills = {}, {}, 0
    for name in ("undisturbed", "disturbed"):
        begin = time.monotonic()
        process = start(a.folder / name, gin_file, a.steps)
        try:
            if name == "disturbed":
                kills = disturb(process, a.folder / name, a.kills, a.steps * WORKERS)
            code = process.wait()
        finally:
            process.terminate()
        if code or (name == "disturbed" and kills < a.kills):
            sys.exit(f"the {name} run ended with exit code {code} after {kills} kills")
        results[name], seconds[name] = read_json(a.folder / name / "result.json"), time.monotonic() - begin
    counts = {
        task: read_json(a.folder / "disturbed" / "status.json")["tasks"][task]["done"]
        for task in results["disturbed"]["tasks"]
    }
    found = {
        "kills": kills,
        "steps": counts,
        "exact": set(counts.values()) == {a.steps},
        "interrupted_steps": sum(results["disturbed"]["cluster"]["interrupted_steps"].values()),
        "missing_updates": results["disturbed"]["cluster"]["missing_updates"],
        "test_accuracy": {n: {t: round(v["test_accuracy"], 3) for t, v in r["tasks"].items()} for n, r in results.items()},
        "seconds": {name: round(value) for name, value in seconds.items()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
