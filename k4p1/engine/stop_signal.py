"""SIGTERM and SIGINT as a wish that the training loop looks at between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from k4p1 import errors


@contextlib.contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within it, and outside a training loop, SIGTERM raises `Preempted` where the main thread is: a run ends in order."""

    def end(number, _frame):
        raise errors.Preempted(f"asked to stop (SIGTERM); {errors.again()} resumes from the newest checkpoint")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignal:
    """`with StopSignal() as stop:` catches SIGTERM and SIGINT; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no signal handlers, nothing is caught.
    """

    def __init__(self):
        self.caught: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number, _frame) -> None:
        if self.caught == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.caught = number

    def error(self, saved: str | None) -> errors.K4p1Error:
        """What to raise; `saved` is `Bookkeeping.saved`: where the state was saved, None if nowhere."""
        outcome = "nothing was saved (no model_dir)" if saved is None else f"{saved}; {errors.again()} resumes there"
        if self.caught == signal.SIGINT:
            return errors.Interrupted(f"interrupted; {outcome}")
        return errors.Preempted(f"asked to stop (SIGTERM); {outcome}")
