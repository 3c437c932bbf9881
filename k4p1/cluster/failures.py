"""TensorFlow's errors on a cluster: what a restart mends, what the data is to blame for, and the rest."""

import tensorflow as tf

from k4p1 import errors
from k4p1.cluster.tensorflow_private import is_server_failure
from k4p1.engine.data_errors import data_errors

_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)
_HEADINGS = ("Graph execution error:",)
_LOST_WORDS = ("invalid device", "unknown device", "remote_handle", "context_id", "been restarted", "does not exist")


def explained(error: Exception) -> errors.K4p1Error:
    """A failure of a step or of the cluster as an error for the person who runs it."""
    task, worker = getattr(error, "k4p1_task", None), getattr(error, "k4p1_worker", None)
    error = getattr(error, "original_exception", error)
    lines = [line for line in str(error).splitlines() if line.strip() not in ("", *_HEADINGS)]
    first = (lines or [type(error).__name__])[0][:200]
    lost = is_server_failure(error) or isinstance(error, _LOST) or any(words in str(error) for words in _LOST_WORDS)
    if lost:
        return errors.ServerLostError(f"a parameter server is lost ({first})")
    place = "" if task is None else f"task '{task}' on worker {worker}: "
    if isinstance(error, (tf.errors.NotFoundError, tf.errors.OutOfRangeError)):
        return errors.DataError(f"{place}{first}")
    try:
        with data_errors(task or "of the run", worker):
            raise error
    except errors.DataError as e:
        return e
    except Exception:
        return errors.ClusterError(f"{place}{type(error).__name__}: {first}")
