"""Restarting the coordinator's process, in place, after a parameter server was lost."""

import os
import sys

from k4p1 import errors

_VARIABLE = "K4P1_RESTARTS"
_MOST = 20


def start_again(error: errors.ServerLostError) -> None:
    """Replaces this process by one with the same command line, which waits for the servers and resumes the run.

    TensorFlow's connection to a lost server cannot be repaired within a process. Number and environment of the process stay.

    Raises:
      ServerLostError: the error, after 20 restarts, or where there is no command line to repeat.
    """
    restarts = int(os.environ.get(_VARIABLE, "0"))
    if restarts >= _MOST:
        raise errors.ServerLostError(f"{error}; given up after {restarts} restarts") from error
    print(f"{str(error).splitlines()[0]}; returning to the newest checkpoint", file=sys.stderr, flush=True)
    os.environ[_VARIABLE] = str(restarts + 1)
    sys.stdout.flush()
    resume = "--resume"  # whatever was said at first: this time there is something to resume from
    os.execv(sys.executable, [sys.executable, "-m", "k4p1", *sys.argv[1:], resume])
