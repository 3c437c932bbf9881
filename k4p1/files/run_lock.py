"""Who owns a model directory: one run per folder, one coordinator per run."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
import socket
import struct
import sys
from collections.abc import Iterator

from k4p1 import errors
from k4p1.files import atomic, status_file
from k4p1.files.run_record import RUN_FILE

NAME = "coordinator.lock"
LAUNCHER = "launcher.lock"
_WAITS_FOR = "waits for "
_FLOCK = "qqihh" if sys.platform == "darwin" else "hhqqi"
_held: dict[pathlib.Path, "RunLock"] = {}


class RunLock:
    """The lock of a folder in the hands of this process; its file says who holds it, and for whom that process waits."""

    def __init__(self, handle):
        self._handle, self._who = handle, f"process {os.getpid()} on {socket.gethostname()}\n"

    def waits_for(self, whom: str) -> None:
        """Says for whom the process waits before it can begin; empty: for nobody. On a full disk the old text stays."""
        with contextlib.suppress(OSError):
            self.write(whom)

    def write(self, whom: str) -> None:
        """Writes who holds the lock, and for whom it waits.

        Raises:
          OSError: the file cannot be written; it stays as it was.
        """
        text = (self._who + (f"{_WAITS_FOR}{whom}\n" if whom else "")).encode()
        os.pwrite(self._handle.fileno(), text, 0)  # nothing is left in a buffer, to fail once more when the file is closed
        os.ftruncate(self._handle.fileno(), len(text))

    def text(self) -> str:
        """What the file says."""
        self._handle.seek(0)
        return self._handle.read()


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a lock file tells from outside.

    Attributes:
      held: whether a living process holds the lock; None where the file system cannot say.
      who: the process that held it last, such as `process 12 on host`.
      waiting_for: for whom that process waits before it begins; empty for nobody.
    """

    held: bool | None
    who: str = ""
    waiting_for: str = ""


def holder(folder: pathlib.Path) -> Holder:
    """Looks at the lock of a folder, and takes nothing."""
    path = folder / NAME
    try:
        if path.resolve() in _held:  # to close the file once more would release the lock
            held, text = True, _held[path.resolve()].text()
        else:
            with open(path, encoding="utf-8") as handle:
                text, held = handle.read(), _is_locked(handle)
    except FileNotFoundError:
        return Holder(False)
    except OSError:
        return Holder(None)
    who, _, rest = text.partition("\n")
    waiting = rest.strip().removeprefix(_WAITS_FOR) if held else ""
    return Holder(held, who, waiting)


def _is_locked(handle) -> bool | None:
    """Asks for a lock that conflicts with that of a coordinator, without taking one."""
    order = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if _FLOCK[0] == "h" else (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
    try:
        answer = struct.unpack(_FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, struct.pack(_FLOCK, *order)))
    except OSError:
        return None
    return answer[0 if _FLOCK[0] == "h" else 3] != fcntl.F_UNLCK


@contextlib.contextmanager
def run_lock(folder: pathlib.Path, name: str = NAME) -> Iterator[RunLock]:
    """Holds the folder for this process; the system releases it when the process ends, however it ends.

    A POSIX record lock, which network file systems know too.

    Args:
      folder: of the run.
      name: of the lock: `NAME` for who trains, `LAUNCHER` for who starts a local cluster, which outlives it.

    Raises:
      ConfigError: another process holds it; names host and process.
      StorageError: the folder cannot be written.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")  # closed below
    except OSError as e:
        raise atomic.storage_error(path, e) from e
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                raise atomic.storage_error(path, e) from e
            handle.seek(0)
            who = handle.read().partition("\n")[0].strip() or "another process"
            raise errors.ConfigError(
                f"{folder} is in use by a coordinator ({who}); wait for it, stop it, or give another "
                f"{errors.option('model_dir')}"
            ) from e
        lock = _held[path.resolve()] = RunLock(handle)
        try:
            try:
                lock.write("")
            except OSError as e:
                raise atomic.storage_error(path, e) from e
            yield lock
        finally:
            del _held[path.resolve()]


def check_usable(folder: pathlib.Path) -> None:
    """Makes sure that a run may begin or resume in a folder, and leaves its files as they are.

    Raises:
      ConfigError: it holds something else than a run, or another process is using it.
    """
    if not folder.is_dir():
        return
    ours = {RUN_FILE, NAME, LAUNCHER, status_file.NAME, "logs", "gin"}
    if not (folder / RUN_FILE).is_file() and any(path.name not in ours for path in folder.iterdir()):
        raise errors.ConfigError(
            f"{folder} is not empty and holds no run of k4p1; give a new or empty {errors.option('model_dir')}"
        )
    if (folder / NAME).is_file():
        with run_lock(folder):
            pass
