"""Messages between the process of a run and the process that coordinates its cluster."""

import contextlib
import queue
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any


class Link:
    """One end: `send` never waits for the other side, `receive` waits as long as it is told.

    Args:
      pipe: of both directions, to the other process.
    """

    def __init__(self, pipe: Pipe):
        self._pipe = pipe
        self._outgoing: queue.SimpleQueue[tuple[str, tuple] | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._send_all, name="link", daemon=True).start()

    def send(self, name: str, *values: Any) -> None:
        """Sends a message; to a process that is gone it is lost."""
        self._outgoing.put((name, values))

    def receive(self, timeout: float | None) -> tuple[str, tuple] | None:
        """The next message, or None after `timeout` seconds.

        Raises:
          EOFError: the other process is gone, or has closed its end.
        """
        try:
            return self._pipe.recv() if self._pipe.poll(timeout) else None
        except OSError as e:
            raise EOFError from e

    def flush(self, timeout: float) -> None:
        """Waits until all is sent, at most so many seconds."""
        sent = threading.Event()
        self._outgoing.put(sent)
        sent.wait(timeout)

    def close(self) -> None:
        """Closes this end."""
        with contextlib.suppress(OSError):
            self._pipe.close()

    def _send_all(self) -> None:
        while True:
            message = self._outgoing.get()
            if isinstance(message, threading.Event):
                message.set()
                continue
            with contextlib.suppress(OSError):
                self._pipe.send(message)


class LinkedStatus:
    """Stands for the `StatusFile` of the run."""

    def __init__(self, link: Link):
        self._link = link

    def update(self, state: str | None = None, **parts: Any) -> None:
        """See `StatusFile`."""
        self._link.send("status", state, parts)


class LinkedReporter:
    """Stands for the `Reporter` of the run, which is in its process."""

    def __init__(self, link: Link):
        self._link, self.status = link, LinkedStatus(link)

    def __enter__(self) -> "LinkedReporter":
        return self

    def __exit__(self, *_) -> None:
        pass

    def steps(self, done: Mapping[str, int], reports: Sequence[Any]) -> None:
        """See `Reporter`."""
        self._link.send("steps", dict(done), list(reports))

    def resumed(self, done: Mapping[str, int]) -> None:
        """See `Reporter`."""
        self._link.send("begins", dict(done))

    def progress(self, done: Mapping[str, int]) -> None:
        """See `Reporter`."""
        self._link.send("progress", dict(done))

    def saved(self, done: Mapping[str, int]) -> None:
        """See `Reporter`."""
        self._link.send("saved_steps", dict(done))

    def message(self, text: str) -> None:
        """See `Reporter`."""
        self._link.send("message", text)
