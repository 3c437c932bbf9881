"""`status.json`: where a run stands, for whoever looks from outside."""

import copy
import os
import pathlib
import socket
import threading
import time
from typing import Any

from k4p1 import errors
from k4p1.files import atomic, schema

NAME = "status.json"
TRAINING, FINISHED, FAILED, STOPPED = "training", "finished", "failed", "stopped"

FIELDS = {
    "state": schema.TEXT,
    "host": schema.TEXT,
    "pid": schema.WHOLE,
    "started": schema.NUMBER,
    "time": schema.NUMBER,
    "reason": schema.TEXT.or_missing(""),
    "tasks": schema.object_of(schema.OBJECT),
    "workers": schema.Field(
        "an object by number of worker",
        lambda value: schema.object_of(schema.OBJECT).holds(value) and all(k.isdecimal() and k.isascii() for k in value),
    ),
    "owners": schema.object_of(schema.OBJECT).or_missing({}),
    "events": schema.Field(
        "a list of events, each with time and text",
        lambda value: (
            schema.list_of(schema.OBJECT).holds(value)
            and all(schema.NUMBER.holds(e.get("time")) and schema.TEXT.holds(e.get("text")) for e in value)
        ),
    ),
}
"""What `status.json` holds."""

_MEASURED = dict.fromkeys(
    ("loss", "steps_per_s", "examples_per_s", "staleness_mean", "staleness_max"), schema.MEASURED.or_none()
)
TASK_FIELDS = {
    **_MEASURED,
    "done": schema.COUNT.or_missing(0),
    "target": schema.COUNT.or_none(),
    "interrupted": schema.COUNT.or_none(),
    "workers": schema.list_of(schema.COUNT).or_missing([]),
}
WORKER_FIELDS = {
    **_MEASURED,
    "state": schema.TEXT.or_missing(""),
    "tasks": schema.list_of(schema.TEXT).or_missing([]),
    "steps": schema.COUNT.or_none(),
}
_SECONDS = 2.0
_EVENTS = 20


class StatusFile:
    """The state of a run in its folder, written at most every two seconds and at every change of state.

    Nothing is written before `begin`: a run that is refused leaves the status of the one before it as it is.
    """

    def __init__(self):
        self._path: pathlib.Path | None = None
        self._status: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
            "state": "starting",
            "tasks": {},
            "workers": {},
            "owners": {},
            "events": [],
        }
        self._written = 0.0
        self._lock = threading.RLock()

    def begin(self, folder: pathlib.Path) -> None:
        """From here on the status goes into this model directory."""
        self._path = folder / NAME

    def update(self, state: str | None = None, **parts: Any) -> None:
        """Changes the state, or parts of it: `tasks`, `workers` and `owners` (of parameters) by name."""
        with self._lock:
            changed = state is not None and state != self._status["state"]
            if changed:
                self._status["state"] = state
            for part, entries in parts.items():
                for name, values in entries.items():
                    self._status[part].setdefault(str(name), {}).update(values)
            if changed or time.monotonic() - self._written > _SECONDS:
                self._write()

    def end(self, state: str, reason: str = "") -> None:
        """The last state of the run, and why."""
        with self._lock:
            self._status["state"] = state
            if reason:
                self._status["reason"] = reason.splitlines()[0]
            self._write()

    def event(self, text: str) -> None:
        """Adds a line to what happened; the last 20 are kept."""
        with self._lock:
            self._status["events"] = [*self._status["events"], {"time": time.time(), "text": text}][-_EVENTS:]
            self._write()

    def copy(self) -> dict[str, Any]:
        """The present state, for other threads."""
        with self._lock:
            return copy.deepcopy(self._status)

    def _write(self) -> None:
        if self._path is not None:
            self._written = time.monotonic()
            atomic.write_json(self._path, {**self._status, "time": time.time()})


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The last state written in a folder; empty if there is none.

    Raises:
      ArtifactError: it cannot be read, or a field is wrong.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    status = schema.read(path, FIELDS)
    for part, fields in (("tasks", TASK_FIELDS), ("workers", WORKER_FIELDS)):
        for name, values in status[part].items():
            measured = {key: schema.MEASURED for key in values if key.startswith("validation_")}
            status[part][name] = schema.check(f"{path}, {part} {name}", values, {**fields, **measured})
    return status


def read_if_whole(folder: pathlib.Path) -> dict[str, Any]:
    """The same for who can do without: empty where it cannot be read."""
    try:
        return read(folder)
    except errors.ArtifactError:
        return {}
