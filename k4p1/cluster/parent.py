"""A process that was started by another one ends with it, even if that one was killed."""

import os
import signal
import threading
import time

VARIABLE = "K4P1_PARENT"
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 60.0
_LINGER_SECONDS = 20.0


def end_with_parent(gently: bool) -> None:
    """Watches the process that `K4P1_PARENT` names; without the variable nothing happens.

    Args:
      gently: first ask this process to stop (SIGTERM), so that it can save; end it after a minute. Otherwise it ends after
        twenty seconds, in which such a process can still read its vectors.
    """
    parent = os.environ.get(VARIABLE)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(_LOOK_SECONDS)
        if gently:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS if gently else _LINGER_SECONDS)
        os._exit(75)

    threading.Thread(target=watch, name="watch parent", daemon=True).start()
