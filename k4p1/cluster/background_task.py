"""A function that runs beside the coordinator's loop, one call at a time."""

import threading
from collections.abc import Callable


class BackgroundTask:
    """`with BackgroundTask(function) as work:` calls it in a thread of its own.

    Args:
      function: of nothing; what it raises comes out of the next `check` or `wait`.
    """

    def __init__(self, function: Callable[[], object]):
        self._function = function
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "BackgroundTask":
        return self

    def __exit__(self, *_) -> None:
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def start(self) -> bool:
        """Calls the function, unless the last call is still running; returns whether it does."""
        self.check()
        if self._thread is not None and self._thread.is_alive():
            return False
        self._thread = threading.Thread(target=self._run, name="background task", daemon=True)
        self._thread.start()
        return True

    def check(self) -> None:
        """Raises what the last call raised."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits for the last call."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as e:  # it belongs to the loop
            self._error = e
