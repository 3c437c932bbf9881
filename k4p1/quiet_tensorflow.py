"""Importing TensorFlow without the lines that its libraries print before any log level is read."""

import contextlib
import os
import sys
from collections.abc import Iterator

_BEFORE_DEVICES = False


def import_quietly() -> None:
    """Imports TensorFlow; what it has to say on the way, and its advice on retracing, is not for the user."""
    global _BEFORE_DEVICES
    if "tensorflow" in sys.modules and not _BEFORE_DEVICES:
        return
    only_import()
    _BEFORE_DEVICES = False
    with _silence():
        import tensorflow as tf

        tf.config.list_physical_devices()


def only_import() -> None:
    """Imports TensorFlow, and does not look for devices: this process will be forked."""
    global _BEFORE_DEVICES
    if "tensorflow" in sys.modules:
        return
    # On a cluster TensorFlow reports a lost worker at length, as errors; k4p1 reports it in one line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if os.environ.get("TF_CONFIG") else "2")
    with _silence():
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")
    _BEFORE_DEVICES = True


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
