"""Who owns a model directory: one run per folder, one coordinator per run."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from k4p1 import errors
from k4p1.files import atomic, status_file
from k4p1.files.run_record import RUN_FILE

NAME = "coordinator.lock"
LAUNCHER = "launcher.lock"


@contextlib.contextmanager
def run_lock(folder: pathlib.Path, name: str = NAME) -> Iterator[None]:
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
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below, and kept open until then
    except OSError as e:
        raise atomic.storage_error(path, e) from e
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                raise atomic.storage_error(path, e) from e
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise errors.ConfigError(
                f"{folder} is in use by a coordinator ({holder}); wait for it, stop it, or give another --model_dir"
            ) from e
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def check_usable(folder: pathlib.Path) -> None:
    """Makes sure that a run may begin or resume in a folder, and leaves its files as they are.

    Raises:
      ConfigError: it holds something else than a run, or another process is using it.
    """
    if not folder.is_dir():
        return
    ours = {RUN_FILE, NAME, LAUNCHER, status_file.NAME, "logs"}
    if not (folder / RUN_FILE).is_file() and any(path.name not in ours for path in folder.iterdir()):
        raise errors.ConfigError(f"{folder} is not empty and holds no run of k4p1; give a new or empty --model_dir")
    if (folder / NAME).is_file():
        with run_lock(folder):
            pass
