"""The processes of a local cluster, forked from one that has imported TensorFlow.

An import takes seconds of a core, a fork milliseconds: a cluster starts with one import, and a process that was lost is
back at once. Only imports are shared: no TensorFlow runtime, no thread and no GPU is touched before the fork. Where that
cannot be had (another system than Linux, or a process with threads), and where GPUs are, whose driver may be awake after an
import, each process starts anew.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

from k4p1 import quiet_tensorflow
from k4p1.cluster.parent import VARIABLE as PARENT

_LOOK_SECONDS = 0.1
_ANSWER_SECONDS, _UNTOLD_SECONDS = 60.0, 5.0
_READY, _UNUSABLE = "ready", "unusable"
_SET_NAME = 15
_COMMAND = [sys.executable, "-m", "k4p1"]


class Process(Protocol):
    """What a process can be asked for, as `subprocess.Popen`."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...
    def send_signal(self, number: int) -> None: ...


class NewProcesses:
    """Starts `k4p1 ARGUMENTS` as processes of their own."""

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: pathlib.Path | None = None, name: str = ""
    ) -> Process:
        """Starts a process in a session of its own.

        Args:
          arguments: of `k4p1`.
          environment: all of it.
          log: file that what it says is added to; None: it says it where this process does.
          name: for lists of processes, of forked ones.
        """
        environment = {**environment, PARENT: str(os.getpid())}
        with contextlib.ExitStack() as held:
            out = None if log is None else held.enter_context(open(log, "ab"))
            nothing = None if log is None else subprocess.DEVNULL
            return subprocess.Popen(
                [*_COMMAND, *arguments], env=environment, stdin=nothing, stdout=out, stderr=out, start_new_session=True
            )

    def close(self) -> None:
        """Nothing is held."""


class ForkServer:
    """Starts `k4p1 ARGUMENTS` by forks of a process that has imported TensorFlow and other modules.

    That process ends with this one, or when the server is closed, and what was forked from it ends then, see
    `k4p1.cluster.parent`. When it dies, the next start makes a new one, and what was forked from the old one counts as
    killed once it is gone.

    Args:
      modules: to import.
      folder: of the run: shown in lists of processes.
    """

    def __init__(self, modules: Sequence[str], folder: pathlib.Path):
        self._command = [sys.executable, "-m", __name__, "--model_dir", str(folder), *modules]
        self._process: subprocess.Popen | None = None
        self._replies, self._requests = -1, -1
        self._unread = b""
        self._ended: dict[int, int] = {}
        self._running: set[int] = set()
        self._orphans: set[int] = set()
        self._gone_since: dict[int, float] = {}
        self._lock = threading.RLock()
        self._plain = NewProcesses()
        self._is_usable = sys.platform == "linux"

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], log: pathlib.Path | None = None, name: str = ""
    ) -> Process:
        """See `NewProcesses.start`."""
        with self._lock:
            if self._is_usable and (self._process is None or self._process.poll() is not None):
                self._open()
            if not self._is_usable:
                return self._plain.start(arguments, environment, log, name)
            request = {"arguments": list(arguments), "environment": dict(environment), "name": name}
            request["log"] = None if log is None else str(log.absolute())
            try:
                _write(self._requests, json.dumps(request))
                started = self._reply("pid")
            except (BrokenPipeError, EOFError):  # it was lost this very moment
                self._lose()
                return self._plain.start(arguments, environment, log, name)
            self._running.add(started["pid"])
            return _Forked(self, started["pid"])

    def close(self) -> None:
        """Ends the process, and what was forked from it."""
        with self._lock:
            if self._process is not None:
                os.close(self._requests)
                self._process.wait()
                os.close(self._replies)
                self._process = None
                self._lose()
            for pid in self._orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def exit_code(self, pid: int) -> int | None:
        """The exit code of a process, negative for a signal; None while it runs."""
        with self._lock:
            try:
                while pid not in self._ended and self._process is not None and self._is_told():
                    self._reply("ended")
            except EOFError:
                self._lose()
            if pid in self._running and _is_gone(pid):
                untold = time.monotonic() - self._gone_since.setdefault(pid, time.monotonic())
                if untold > _UNTOLD_SECONDS:
                    self._process.kill()  # frozen: it must not hide what ends
            if pid in self._orphans and _is_gone(pid):
                self._orphans.discard(pid)
                self._ended[pid] = -signal.SIGKILL
            return self._ended.get(pid)

    def _open(self) -> None:
        if self._process is not None:
            os.close(self._requests)
            os.close(self._replies)
            self._lose()
        theirs, self._requests = os.pipe()
        self._replies, their_replies = os.pipe()
        self._unread = b""
        self._process = subprocess.Popen(
            [*self._command, str(theirs), str(their_replies)], pass_fds=(theirs, their_replies), start_new_session=True
        )
        os.close(theirs)
        os.close(their_replies)
        try:
            self._is_usable = self._reply("state")["state"] == _READY
        except EOFError:  # whatever it was, processes of their own will show it
            self._is_usable = False

    def _reply(self, kind: str) -> Mapping[str, int]:
        """The next reply of a kind; ends of processes that are told on the way are kept.

        Raises:
          EOFError: the process is gone, or was silent for too long, and is killed.
        """
        end = time.monotonic() + _ANSWER_SECONDS
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if not newline:
                is_told = select.select([self._replies], [], [], max(0.0, end - time.monotonic()))[0]
                read = os.read(self._replies, 1 << 16) if is_told else b""
                if not read:
                    self._process.kill()
                    raise EOFError
                self._unread += read
                continue
            self._unread = rest
            said = json.loads(line)
            if "ended" in said:
                self._running.discard(said["ended"])
                self._ended[said["ended"]] = said["code"]
            if kind in said:
                return said

    def _is_told(self) -> bool:
        return b"\n" in self._unread or bool(select.select([self._replies], [], [], 0)[0])

    def _lose(self) -> None:
        """Nobody will tell the exit codes of what was forked; it ends by itself, the coordinator when it has saved."""
        self._orphans |= self._running
        self._running = set()


def _is_gone(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class _Forked:
    """A process that was forked from a server."""

    def __init__(self, server: ForkServer, pid: int):
        self._server, self.pid = server, pid

    @property
    def returncode(self) -> int | None:
        return self._server.exit_code(self.pid)

    def poll(self) -> int | None:
        return self._server.exit_code(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("k4p1", timeout)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def main(arguments: Sequence[str]) -> None:
    """The process that others are forked from: imports, then forks as asked until nobody asks any more."""
    *_, requests, replies = arguments
    modules = arguments[2:-2]
    requests, replies = int(requests), int(replies)
    for number in (signal.SIGINT, signal.SIGTERM):  # who started it ends it
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads would not survive a fork, and servers need none
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of a process of a cluster, see `quiet_tensorflow`; read once
    quiet_tensorflow.only_import()
    for module in modules:
        importlib.import_module(module)
    is_alone = len(os.listdir("/proc/self/task")) == 1
    _write(replies, json.dumps({"state": _READY if is_alone else _UNUSABLE}))
    unread, is_asked = b"", is_alone
    while is_asked:
        if select.select([requests], [], [], _LOOK_SECONDS)[0]:
            read = os.read(requests, 1 << 16)
            is_asked = bool(read)
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    os.close(requests)
                    os.close(replies)
                    _run(json.loads(line))
                _write(replies, json.dumps({"pid": pid}))
        for pid, code in _ended():
            _write(replies, json.dumps({"ended": pid, "code": code}))


def _ended() -> list[tuple[int, int]]:
    found = []
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _run(request: Mapping) -> NoReturn:
    """Runs `k4p1` in this process, which was just forked."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if request["log"] is not None:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for descriptor, copy in ((nothing, 0), (log, 1), (log, 2)):
                os.dup2(descriptor, copy)
        parent = os.getppid()
        os.environ.clear()
        os.environ.update({**request["environment"], PARENT: str(parent)})
        ctypes.CDLL(None).prctl(_SET_NAME, f"k4p1 {request['name']}".strip().encode()[:15])
        sys.argv = ["k4p1", *request["arguments"]]
        runpy.run_module("k4p1", run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _write(descriptor: int, line: str) -> None:
    data = line.encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    main(sys.argv[1:])
