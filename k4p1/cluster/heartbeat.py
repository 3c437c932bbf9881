"""Whether the parameter servers are alive; polled during training."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from k4p1 import errors
from k4p1.cluster.store import ServerStore

_SECONDS = 0.5
_WAIT_SECONDS = 0.1
T = TypeVar("T")


class ServerHeartbeat:
    """`with ServerHeartbeat(store) as heartbeat:` asks all servers twice a second, and reads the tickets that are taken.

    Args:
      store: on the servers.
      silence_timeout_s: how long they may be silent.
      who: names the servers that are silent.

    Attributes:
      done: steps of each task by the servers' count, as last read.
    """

    def __init__(self, store: ServerStore, silence_timeout_s: float = 60.0, who: Callable[[], str] = str):
        self._store, self._silence_timeout_s, self._who = store, silence_timeout_s, who
        self.done = store.done()
        self._heard = time.monotonic()
        self._failure: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="server heartbeat", daemon=True)

    def __enter__(self) -> "ServerHeartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self._thread.join(timeout=2 * _SECONDS)

    def check(self) -> None:
        """Raises ServerLostError if a server is lost or has been silent for a minute."""
        if self._failure is not None:
            first = (str(self._failure).splitlines() or [type(self._failure).__name__])[0][:160]
            raise errors.ServerLostError(f"a parameter server is lost ({first})") from self._failure
        if time.monotonic() - self._heard > self._silence_timeout_s:
            who = self._who() or "a parameter server"
            raise errors.ServerLostError(f"{who} has been silent for {self._silence_timeout_s:g} s")

    def wait_for(self, function: Callable[[], T]) -> T:
        """What a function returns that waits for servers; it has a thread of its own, and this one goes on to check.

        Raises:
          ServerLostError: a server is lost, or silent for too long.
        """
        found: list[T | BaseException] = []

        def call() -> None:
            try:
                found.append(function())
            except BaseException as e:  # it belongs to whoever waits
                found.append(e)

        thread = threading.Thread(target=call, name="waits for servers", daemon=True)
        thread.start()
        while thread.is_alive():
            self.check()
            thread.join(_WAIT_SECONDS)
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    def _ask(self) -> None:
        while not self._stopped.wait(_SECONDS):
            try:
                self.done = self._store.done()
                self._heard = time.monotonic()
            except Exception as e:  # whatever it is, the coordinator's thread must hear of it
                self._failure = e
                return
