"""Kills workers of a running cluster and compares with a run that nobody disturbs.

    python benchmarks/chaos.py [--kills 20] [--steps 300] [--folder runs/chaos]
    python benchmarks/chaos.py --silent [--events 20] [--seconds 300] [--seed 0]

Four tasks on embedded digits, one parameter server, four workers, all processes on this machine. SIGKILL goes to one worker
after the other, evenly spread over the steps of the run, chosen at random (seed 0). The last line is one JSON object: what
became of every task.

With `--silent`: two servers, and events drawn from kill and silence (SIGSTOP, 5 to 90 s) of a worker, silence of a server,
kill of the coordinator, and 10 s without space on the disk, at moments drawn from so many seconds of running, start and end
included. A run that ends with 75 (try again), for want of space, or killed is started again, by the same command.
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

from silent_events import Events, drawn

from k4p1.cli import gin_files

WORKERS = 4
AGAIN = (75, 2, -9)  # try again, no space, killed
SILENT_BINDINGS = ("train.silence_timeout_s = 20", "train.borrow_workers = True", "train.no_worker_timeout_s = 30")
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


def start(folder, gin_file, steps, servers=1, more=()):
    """The command line of the run."""
    command = [sys.executable, "-m", "k4p1", "train", "--gin_file", str(gin_file), "--model_dir", str(folder)]
    command += ["--local_cluster", f"ps:{servers},workers:{WORKERS}"]
    command += [part for binding in (f"steps = {steps}", *more) for part in ("--gin_bindings", binding)]
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


def befall(folder, gin_file, steps, events):
    """Runs to the end while events happen: (what happened by kind, exit codes of all starts)."""
    happening, left, codes, counts = Events(folder), list(events), [], {}
    running = 0.0
    try:
        while not codes or codes[-1] in AGAIN:
            if len(codes) > 20:
                sys.exit(f"started {len(codes)} times: {codes}")
            process, last = start(folder, gin_file, steps, 2, SILENT_BINDINGS), time.monotonic()
            while process.poll() is None:
                time.sleep(0.1)
                running, last = running + time.monotonic() - last, time.monotonic()
                happening.pass_time()
                if left and left[0][0] < running and happening.happen(*left[0][1:]):  # otherwise once its process is there
                    _, kind, index, seconds = left.pop(0)
                    counts[kind] = counts.get(kind, 0) + 1
                    silence = f" for {seconds:.0f} s" if "silent" in kind else ""
                    print(f"{running:.0f} s: {kind} {index}{silence}", flush=True)
            codes.append(process.returncode)
            print(f"exit {codes[-1]} at {running:.0f} s", flush=True)
    finally:
        happening.over()
        process.terminate()
        process.wait()
    return counts, codes


def silent(a, gin_file):
    """A run that nobody disturbs, and one that events befall."""
    process = start(a.folder / "undisturbed", gin_file, a.steps, 2, SILENT_BINDINGS)
    if code := process.wait():
        sys.exit(f"the undisturbed run ended with exit code {code}")
    events = drawn(a.seed, a.events, a.seconds, WORKERS, 2)
    counts, codes = befall(a.folder / "disturbed", gin_file, a.steps, events)
    results = {name: read_json(a.folder / name / "result.json") for name in ("undisturbed", "disturbed")}
    account = results["disturbed"]["cluster"]
    due = {owner: account["updates"][owner] + account["missing_updates"][owner] for owner in account["updates"]}
    dropped = {task: account["late_updates"][task] + account["overflowed_updates"][task] for task in account["tickets"]}
    exact = all(due[t] + dropped[t] == account["tickets"][t] == a.steps for t in account["tickets"] if t in due)
    found = {
        "seed": a.seed,
        "events": counts,
        "exit_codes": codes,
        "exact": exact and due["shared"] + sum(dropped.values()) == a.steps * len(dropped),
        "account": {k: account[k] for k in ("updates", "late_updates", "missing_updates", "interrupted_steps")},
        "test_accuracy": {n: {t: round(v["test_accuracy"], 3) for t, v in r["tasks"].items()} for n, r in results.items()},
    }
    print(json.dumps(found))
    sys.exit(0 if codes[-1] == 0 and found["exact"] else 1)


def main():
    """Runs both and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--silent", action="store_true")
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/chaos"))
    a = parser.parse_args()
    shutil.rmtree(a.folder, ignore_errors=True)
    a.folder.mkdir(parents=True)
    gin_file = a.folder / "four_tasks.gin"
    gin_file.write_text(GIN.format(quickstart=gin_files.find("quickstart")))
    if a.silent:
        return silent(a, gin_file)
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
