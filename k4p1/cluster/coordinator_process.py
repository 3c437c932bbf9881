"""The process that coordinates a cluster: a copy of the process of the run, made before TensorFlow starts there.

TensorFlow waits, holding the interpreter's lock, whenever a function is registered while some process of the cluster is
silent. So the run itself never joins the cluster: it evaluates, writes, watches, and ends or replaces the process that does.

Three processes: the run; a small one that makes copies of itself on demand (the run cannot, once it uses TensorFlow) and
ends with the run; and the copy that coordinates.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection as Pipe
from typing import NoReturn

from k4p1 import errors
from k4p1.cluster.link import Link
from k4p1.cluster.network_namespace import enter_if_told
from k4p1.cluster.tensorflow_private import has_started

_LOOK_SECONDS = 0.2
_ANSWER_SECONDS = 10.0
_START, _KILL = "start", "kill"


class CoordinatorProcess:
    """Starts, ends and replaces the coordinating process.

    Args:
      coordinate: what that process does, of a `Link` to the run, over which it also sends what went wrong.

    Raises:
      ConfigError: TensorFlow has started in this process, which cannot be copied any more.
    """

    def __init__(self, coordinate: Callable[[Link], None]):
        if has_started():
            raise errors.ConfigError(
                "on a cluster, train before anything else uses TensorFlow in this process; its variables would be lost"
            )
        self._orders, theirs = multiprocessing.Pipe()
        self.pid: int | None = None
        run = os.getpid()
        self._copier = os.fork()
        if not self._copier:
            self._orders.close()
            _make_copies(theirs, coordinate, run)
        theirs.close()

    def start(self) -> Link:
        """Starts a coordinating process in place of the one before it, and returns a link to it."""
        self.end()
        ours, theirs = multiprocessing.Pipe()
        self._orders.send(_START)
        reduction.send_handle(self._orders, theirs.fileno(), self._copier)
        theirs.close()
        self.pid = self._answer()
        return Link(ours)

    def end(self) -> int | None:
        """Ends the coordinating process with SIGKILL if it still runs; returns its exit code, None if there was none."""
        if self.pid is None:
            return None
        self._orders.send(_KILL)
        self.pid = None
        return self._answer()

    def _answer(self) -> int | None:
        try:
            if self._orders.poll(_ANSWER_SECONDS):
                return self._orders.recv()
        except (EOFError, OSError):
            pass
        raise errors.ClusterError("the process that starts the coordinator is gone; start the run again to resume")


def _make_copies(orders: Pipe, coordinate: Callable[[Link], None], run: int) -> NoReturn:
    """The small process: a loop that allocates nothing and waits for nobody but its own children."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the run decides what becomes of them
        signal.signal(number, signal.SIG_IGN)
    child = None
    try:
        enter_if_told()
        while os.getppid() == run:
            if not orders.poll(_LOOK_SECONDS):
                continue
            order = orders.recv()
            if order == _START:
                handle = reduction.recv_handle(orders)
                child = os.fork()
                if not child:
                    orders.close()
                    _coordinate(Pipe(handle), coordinate)
                os.close(handle)
                orders.send(child)
            else:
                orders.send(_end(child))
                child = None
    except (EOFError, OSError, KeyboardInterrupt):
        pass
    finally:
        _end(child)
        os._exit(0)


def _end(child: int | None) -> int | None:
    if child is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _coordinate(pipe: Pipe, coordinate: Callable[[Link], None]) -> NoReturn:
    code = 1
    try:
        link = Link(pipe)
        coordinate(link)
        link.flush(60.0)
        code = 0
    finally:
        os._exit(code)  # the threads of connections never stop
