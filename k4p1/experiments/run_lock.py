"""One coordinator a model directory."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from k4p1 import artifact, errors

NAME = "coordinator.lock"


@contextlib.contextmanager
def run_lock(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets go of it when the process ends, however it ends.

    A POSIX record lock, which network file systems know too.

    Raises:
      ConfigError: another process holds it; names host and process.
      StorageError: the folder cannot be written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below, and kept open until then
    except OSError as e:
        raise artifact.storage_error(path, e) from e
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise errors.ConfigError(
                f"{folder} is in use by a coordinator ({holder}); wait for it, stop it, or give another --model_dir"
            ) from e
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def check_free(folder: pathlib.Path) -> None:
    """Raises what `run_lock` would raise."""
    if (folder / NAME).is_file():
        with run_lock(folder):
            pass
