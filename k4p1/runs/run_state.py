"""In which state a run is, by its files and its lock: also whether the process that wrote them is still there."""

import dataclasses
import pathlib
import socket
import time
from typing import Any

from k4p1 import errors
from k4p1.files import run_lock, status_file

STARTING, WAITING, DEAD, ABSENT = "starting", "waiting", "dead", "absent"

EXIT_CODES = {
    status_file.FINISHED: 0,
    STARTING: 10,
    status_file.TRAINING: 11,
    WAITING: 12,
    status_file.STOPPED: 13,
    DEAD: 14,
    status_file.FAILED: 15,
    ABSENT: 2,
}
"""What `k4p1 status` returns, by state, from the best to the worst; for several runs, that of the worst."""

_ENDS = (status_file.FINISHED, status_file.FAILED, status_file.STOPPED)
_SILENT_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class RunState:
    """What is known of a run.

    Attributes:
      model_dir: its folder.
      state: one of `EXIT_CODES`.
      reason: why it is in that state; empty where the state says all.
      last_sign_s: seconds since the last sign of life; None without one.
      status: the content of `status.json`; empty without one.
    """

    model_dir: pathlib.Path
    state: str
    reason: str
    last_sign_s: float | None
    status: dict[str, Any]

    @property
    def done(self) -> int:
        """Steps of all tasks."""
        return sum(values.get("done") or 0 for values in self.status.get("tasks", {}).values())

    @property
    def target(self) -> int:
        """Step targets of all tasks."""
        return sum(values.get("target") or 0 for values in self.status.get("tasks", {}).values())

    def as_json(self) -> dict[str, Any]:
        """The entry of a run in `k4p1 status --json`; the schema is in docs/operations.md."""
        status = self.status
        return {
            "model_dir": str(self.model_dir),
            "state": self.state,
            "exit_code": EXIT_CODES[self.state],
            "reason": self.reason,
            "last_sign_s": None if self.last_sign_s is None else round(self.last_sign_s, 3),
            "host": status.get("host"),
            "pid": status.get("pid"),
            "started": status.get("started"),
            "updated": status.get("time"),
            "steps": {"done": self.done, "target": self.target},
            "tasks": status.get("tasks", {}),
            "workers": status.get("workers", {}),
            "missing_updates": {name: owner.get("missing", 0) for name, owner in status.get("owners", {}).items()},
            "events": status.get("events", []),
        }


def look(model_dir: pathlib.Path) -> RunState:
    """The state of the run in a folder.

    A run that says it is training is dead when the lock of its folder is free. That is believed at once of a process of this
    machine; a file system that does not share its locks shows those of other machines as free, so that there the run must
    have been silent for five minutes, too.

    Raises:
      ArtifactError: the folder does not exist or holds no run, or its status cannot be read.
    """
    if not model_dir.is_dir():
        raise errors.ArtifactError(f"model_dir {model_dir} does not exist")
    status, holder = status_file.read(model_dir), run_lock.holder(model_dir)
    if not status and not holder.held:
        raise errors.ArtifactError(f"{model_dir} holds no {status_file.NAME}: no run of k4p1 has begun to train there")
    age = time.time() - status["time"] if status else None
    if holder.held and holder.waiting_for:
        return RunState(model_dir, WAITING, f"{holder.who} waits for {holder.waiting_for}", age, status)
    if holder.held and (not status or status["state"] in _ENDS or not _is_of(status, holder)):
        return RunState(model_dir, STARTING, f"{holder.who} prepares data and models", age, status)
    if status["state"] in _ENDS:
        return RunState(model_dir, status["state"], status.get("reason", ""), age, status)
    believed = age > _SILENT_SECONDS or (holder.held is False and status["host"] == socket.gethostname())
    if not holder.held and believed:
        reason = f"process {status['pid']} on {status['host']} is gone; the same command resumes from the newest checkpoint"
        return RunState(model_dir, DEAD, reason, age, status)
    return RunState(model_dir, status_file.TRAINING, "", age, status)


def _is_of(status: dict[str, Any], holder: run_lock.Holder) -> bool:
    """Whether the status was written by the process that holds the lock."""
    return holder.who == f"process {status['pid']} on {status['host']}"
