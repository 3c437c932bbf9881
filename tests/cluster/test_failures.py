"""What becomes of TensorFlow's errors: what a restart mends, what the data is to blame for, and the rest."""

import pytest
import tensorflow as tf

from k4p1 import errors
from k4p1.cluster.failures import explained


def of(kind, message, task="a", worker=1):
    error = kind(None, None, message)
    error.k4p1_task, error.k4p1_worker = task, worker
    return error


@pytest.mark.parametrize(
    "error",
    [
        of(tf.errors.UnavailableError, "Socket closed\nAdditional GRPC error information from remote target /job:ps/task:1"),
        of(tf.errors.AbortedError, "Unable to find a context_id matching the specified one"),
        of(tf.errors.InvalidArgumentError, "Resource input tensor contains an invalid device."),
        of(tf.errors.NotFoundError, "Resource localhost/vector does not exist."),
        of(tf.errors.FailedPreconditionError, "Could not find variable updates_shared."),
    ],
)
def test_a_restart_mends_it(error):
    assert isinstance(explained(error), errors.ServerLostError)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (of(tf.errors.InvalidArgumentError, "Input is no JPEG"), "task 'a' on worker 1: Input is no JPEG"),
        (of(tf.errors.DataLossError, "corrupted record at 17"), "task 'a' on worker 1: its data is damaged"),
        (of(tf.errors.NotFoundError, "/data/train-0; No such file"), "task 'a' on worker 1: /data/train-0; No such file"),
        (of(tf.errors.NotFoundError, "Graph execution error:\n\nNo such file"), "task 'a' on worker 1: No such file"),
        (of(tf.errors.OutOfRangeError, "End of sequence"), "task 'a' on worker 1: End of sequence"),
    ],
)
def test_the_data_is_to_blame(error, message):
    found = explained(error)
    assert isinstance(found, errors.DataError) and str(found).startswith(message)


def test_anything_else_names_task_and_worker_and_is_not_tried_for_ever():
    found = explained(of(tf.errors.ResourceExhaustedError, "OOM when allocating tensor"))
    assert type(found) is errors.ClusterError
    assert str(found) == "task 'a' on worker 1: ResourceExhaustedError: OOM when allocating tensor"


def test_an_error_of_a_data_set_comes_wrapped():
    inner = of(tf.errors.DataLossError, "corrupted record at 17")
    wrapped = RuntimeError("Input has an error")
    wrapped.original_exception, wrapped.k4p1_task, wrapped.k4p1_worker = inner, "b", 0
    assert str(explained(wrapped)).startswith("task 'b' on worker 0: its data is damaged")
