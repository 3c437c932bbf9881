"""Importing TensorFlow without the lines that its libraries print before any log level is read."""

import os
import sys


def import_quietly() -> None:
    """Imports TensorFlow; what it has to say on the way, and its advice on retracing, is not for the user."""
    if "tensorflow" in sys.modules:
        return
    # On a cluster TensorFlow reports a lost worker at length, as errors; k4p1 reports it in one line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if os.environ.get("TF_CONFIG") else "2")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import tensorflow as tf

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
