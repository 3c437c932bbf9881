"""Whether the parameter servers are alive; polled during training."""

import threading
import time

from k4p1 import errors
from k4p1.cluster.store import ServerStore

_SECONDS = 0.5
_SILENT_SECONDS = 60.0


class ServerHeartbeat:
    """`with ServerHeartbeat(store) as heartbeat:` asks all servers twice a second, and reads the tickets that are taken.

    Attributes:
      done: steps of each task by the servers' count, as last read.
    """

    def __init__(self, store: ServerStore):
        self._store = store
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
        if time.monotonic() - self._heard > _SILENT_SECONDS:
            raise errors.ServerLostError(f"a parameter server has been silent for {_SILENT_SECONDS:g} s")

    def _ask(self) -> None:
        while not self._stopped.wait(_SECONDS):
            try:
                self._store.beat()
                self.done = self._store.done()
                self._heard = time.monotonic()
            except Exception as e:  # whatever it is, the coordinator's thread must hear of it
                self._failure = e
                return
