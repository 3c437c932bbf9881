"""Events that befall a running cluster: its processes are killed, fall silent, or cannot write; for `chaos.py --silent`."""

import os
import pathlib
import random
import re
import resource
import signal
import time

KINDS = ("kill worker", "silent worker", "silent server", "kill coordinator", "disk full")
_DISK_FULL_SECONDS = 10.0


def drawn(seed, count, seconds, workers, servers):
    """Events as (moment in seconds of running time, kind, index of the process, seconds of silence), by moment."""
    choose = random.Random(seed)
    events = []
    for _ in range(count):
        kind = choose.choice(KINDS)
        index = choose.randrange(servers if kind == "silent server" else workers)
        events.append((choose.uniform(0.0, seconds), kind, index, choose.uniform(5.0, 90.0)))
    return sorted(events)


class Events:
    """Makes events happen in the run of a folder, and ends silences when their time is up.

    Args:
      folder: of the run.
    """

    def __init__(self, folder):
        self._folder, self._ends = folder, []

    def happen(self, kind, index, seconds):
        """Makes an event happen; returns whether there was a process for it."""
        job = "ps" if kind == "silent server" else "worker"
        if kind in ("kill worker", "silent worker", "silent server"):
            pid = self._member(job, index)
            return self._send(pid, signal.SIGKILL) if kind == "kill worker" else self._silence(pid, seconds)
        run, coordinating = self.processes()
        if kind == "kill coordinator":
            return self._send(coordinating or run, signal.SIGKILL)
        limited = [self._limit(pid) for pid in (run, coordinating) if pid is not None]
        return any(limited)

    def processes(self):
        """(process of the run, process that coordinates); None for one that is not there."""
        try:
            run = int(re.search(r"process (\d+)", (self._folder / "coordinator.lock").read_text())[1])
        except (OSError, TypeError):
            return None, None
        below = _children(run)
        return (run if pathlib.Path(f"/proc/{run}").exists() else None), next(
            (child for copier in below for child in _children(copier)), None
        )

    def pass_time(self):
        """Continues what has been silent for long enough."""
        for end in [end for end in self._ends if end[0] < time.monotonic()]:
            self._ends.remove(end)
            end[1]()

    def over(self):
        """Continues everything."""
        for _, undo in self._ends:
            undo()
        self._ends = []

    def _member(self, job, index):
        log = self._folder / "logs" / f"{job}_{index}.log"
        said = re.findall(r"\(process (\d+)\)", log.read_text()) if log.exists() else []
        return int(said[-1]) if said and pathlib.Path(f"/proc/{said[-1]}/cmdline").exists() else None

    def _silence(self, pid, seconds):
        if not self._send(pid, signal.SIGSTOP):
            return False
        self._ends.append((time.monotonic() + seconds, lambda: self._send(pid, signal.SIGCONT)))
        return True

    def _limit(self, pid):
        """No file of a process may grow: writing fails as on a full disk."""
        try:
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        except (OSError, ValueError):
            return False

        def undo():
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
            except (OSError, ValueError):
                return

        self._ends.append((time.monotonic() + _DISK_FULL_SECONDS, undo))
        return True

    @staticmethod
    def _send(pid, number):
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True


def _children(pid):
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []
