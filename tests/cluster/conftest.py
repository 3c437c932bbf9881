"""A run on a local cluster as a user starts it, with the processes behind it."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import SHALLOW

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 400


class ClusterRun:
    """`k4p1 train --local_cluster` in a folder.

    Args:
      folder: model directory.
      cluster: as for `--local_cluster`.
      bindings: of gin, beside those that make the run small.
    """

    def __init__(self, folder, cluster, *bindings):
        self.folder, self._seen = folder, set()
        small = ("batch_size = 8", "train.recalibration_batches = 2", *SHALLOW)
        self._command = [sys.executable, "-m", "k4p1", "train", "--gin_file", "quickstart", "--model_dir", str(folder)]
        self._command += ["--local_cluster", cluster]
        self._command += [part for binding in (*small, *bindings) for part in ("--gin_bindings", binding)]
        self.process = None

    def start(self):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(self._command, env=environment, stderr=subprocess.PIPE, text=True)
        self._end = time.monotonic() + LIMIT_SECONDS
        return self

    def finish(self):
        """Waits for the end: (exit code, what was said)."""
        _, said = self.process.communicate(timeout=max(1.0, self._end - time.monotonic()))
        return self.process.returncode, said

    def read(self, name):
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return {}

    def steps(self):
        return sum(task.get("done", 0) for task in self.read("status.json").get("tasks", {}).values())

    def events(self):
        """What the run last told, a line each."""
        return [event["text"] for event in self.read("status.json").get("events", [])]

    def wait_for(self, condition, what, pause=0.02):
        while not condition():
            if self.process.poll() is not None or time.monotonic() > self._end:
                code = self.process.poll()
                self.kill_all()
                raise AssertionError(f"no {what}; exit {code}: {self.process.stderr.read()[-3000:]}")
            time.sleep(pause)

    def wait_for_steps_of(self, worker, count):
        self.wait_for(
            lambda: self.read("status.json").get("workers", {}).get(str(worker), {}).get("steps", 0) >= count,
            f"{count} steps of worker {worker}",
        )

    def wait_for_steps(self, count):
        self.wait_for(lambda: self.steps() >= count, f"{count} steps")

    def pid(self, role):
        """The process that serves a role, such as `worker_1`; waits until there is a new one after a kill."""
        log = self.folder / "logs" / f"{role}.log"

        def serving():
            said = re.findall(r"\(process (\d+)\)", log.read_text()) if log.exists() else []
            return int(said[-1]) if said and int(said[-1]) not in self._seen else None

        self.wait_for(lambda: serving() is not None, f"process of {role}")
        return serving()

    def kill(self, role):
        pid = self.pid(role)
        self._seen.add(pid)
        os.kill(pid, signal.SIGKILL)

    def left_behind(self):
        """Processes of this run that still are there, after a moment for them to end."""
        end = time.monotonic() + 20
        while found := _processes_of(self.folder):
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        return list(found.values())

    def kill_all(self):
        """Kills whatever belongs to this run: one that hangs ends by nothing less."""
        self.process.kill()
        while found := _processes_of(self.folder):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self.process.wait()


def _processes_of(folder):
    """The command lines of processes that work in a folder, by process number."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(word.startswith("k4p1") for word in words) and any(str(folder) in word for word in words):
            found[int(path.parent.name)] = " ".join(words)
    return found


@pytest.fixture
def cluster_run(tmp_path):
    """Makes runs; whatever happens, nothing is left running."""
    runs = []

    def make(cluster, *bindings, name="model"):
        runs.append(ClusterRun(tmp_path / name, cluster, *bindings))
        return runs[-1]

    yield make
    for run in runs:
        if run.process is not None:
            run.kill_all()
