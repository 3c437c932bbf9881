"""All that k4p1 uses of TensorFlow's private modules: a coordinator whose workers ask for their next step.

`tf.distribute.coordinator.ClusterCoordinator` has one queue from which any worker takes any function. Here every worker asks
a `Dispatcher` what to do next, so that a task's steps run on its worker group alone, nothing waits in a queue, and
assignments may change at any moment. All else (datasets on workers, detecting and recovering lost workers) is TensorFlow's.

`tests/cluster/test_tensorflow_private.py` checks every private name used here; `setup.py` pins TensorFlow's versions.
"""

from typing import Any, Protocol

import tensorflow as tf
from tensorflow.python.distribute.coordinator import cluster_coordinator as tf_coordinator


class Dispatcher(Protocol):
    """Decides on steps and is notified of their outcome. All methods are called from the threads of workers."""

    def next_step(self, worker: int) -> "Step | None":
        """What a worker does next; None: nothing now. The queue is locked: be quick, and run no operations."""

    def finished(self, step: "Step", worker: int, result: Any) -> None:
        """A step returned; None: there was no ticket, or no data."""

    def interrupted(self, step: "Step") -> None:
        """A step was lost with its worker, or its connection; it may or may not have updated parameters."""

    def failed(self, error: Exception) -> None:
        """A step failed for good, or a server is lost."""


class Step(tf_coordinator.Closure):
    """The function of a task, which the worker that asked for it runs; it may be issued again once it has returned.

    Args:
      task: its name.
      function: traced, of one iterator.
      iterator: per-worker values.
      queue: that it comes from.
    """

    def __init__(self, task: str, function: Any, iterator: Any, queue: "PullQueue"):
        super().__init__(function, queue._cancellation_mgr, args=(iterator,))
        self.task, self.worker, self.tag = task, -1, None
        self.dispatcher = queue.dispatcher

    @property
    def traced(self) -> Any:
        """The traced function; steps that are given it do not look for it again."""
        return self._concrete_function

    def execute_on(self, worker: tf_coordinator.Worker) -> None:
        self._output_remote_value_ref = None  # a step may run again and again
        value = self.build_output_remote_value()
        try:
            super().execute_on(worker)
            result = value.fetch()
        except tf.errors.OutOfRangeError:
            # No ticket is left; or no data, which looks alike: the ticket's failure also ends the data of the step.
            result = None
        except Exception as e:
            if not (isinstance(e, tf.errors.CancelledError) and "Iterator was cancelled" in str(e)):
                e.k4p1_task, e.k4p1_worker = self.task, worker.worker_index
                raise
            result = None  # the same, reported by the data that the ticket's failure cancelled
        self.dispatcher.finished(self, worker.worker_index, result)


class PullQueue(tf_coordinator._CoordinatedClosureQueue):
    """A queue of no length: `get` asks the dispatcher.

    Attributes:
      dispatcher: None issues no steps, and those in flight are not reported.
    """

    def __init__(self):
        super().__init__()
        self.dispatcher: Dispatcher | None = None
        self._paused = False

    def get(self, timeout: float | None = None, tag: int | None = None) -> tf_coordinator.Closure | None:
        with self._queue_lock:
            while self._should_process_closures:
                if not self._tagged_queue[tag].empty():  # datasets of this worker come first
                    return self._tagged_queue[tag].get(block=False)
                step = None if self._paused or self.dispatcher is None else self.dispatcher.next_step(tag)
                if step is not None:
                    step.worker = tag
                    self.inflight_closure_count += 1
                    return step
                if not self._closures_queued_condition.wait(timeout=timeout) and timeout is not None:
                    return None
            return None

    def wake(self) -> None:
        """Makes idle workers ask again."""
        with self._queue_lock:
            self._closures_queued_condition.notify_all()

    def pause(self, timeout: float) -> bool:
        """Issues no more steps, and waits for those in flight; False if some did not return in time."""
        with self._queue_lock:
            self._paused = True
            return self._no_inflight_closure_condition.wait_for(lambda: self._inflight_closure_count == 0, timeout)

    def go_on(self) -> None:
        """Ends a pause."""
        with self._queue_lock:
            self._paused = False
            self._closures_queued_condition.notify_all()

    def mark_finished(self) -> None:
        with self._queue_lock:
            self._one_less()
            self._watchdog.report_closure_done()

    def put_back(self, closure: Step) -> None:
        with self._queue_lock:
            self._one_less()
        if self.dispatcher is closure.dispatcher:
            closure.dispatcher.interrupted(closure)

    def mark_failed(self, e: Exception) -> None:
        with self._queue_lock:
            self._one_less()
        dispatcher = self.dispatcher
        if dispatcher is not None:
            dispatcher.failed(e)

    def wait(self, timeout: float | None = None) -> bool:
        with self._queue_lock:
            return self._no_inflight_closure_condition.wait_for(lambda: self._inflight_closure_count == 0, timeout)

    def done(self) -> bool:
        with self._queue_lock:
            return self._inflight_closure_count == 0

    def _one_less(self) -> None:
        self.inflight_closure_count -= 1
        if self._inflight_closure_count == 0:
            self._no_inflight_closure_condition.notify_all()
        self._closures_queued_condition.notify_all()


class _PullCluster(tf_coordinator.Cluster):
    """TensorFlow's cluster with the queue exchanged: the one that the base class makes is stopped and dropped."""

    def __init__(self, strategy: tf.distribute.Strategy):
        self._pull_queue = PullQueue()
        super().__init__(strategy)

    @property
    def closure_queue(self) -> PullQueue:
        """The queue that workers ask."""
        return self._pull_queue

    @closure_queue.setter
    def closure_queue(self, made: tf_coordinator._CoordinatedClosureQueue) -> None:
        made.stop()


class PullCoordinator(tf_coordinator.ClusterCoordinator):
    """A coordinator whose workers ask for steps; see the module.

    Args:
      strategy: `tf.distribute.ParameterServerStrategy`.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        self._strategy = strategy
        strategy.extended._used_with_coordinator = True
        self._cluster = _PullCluster(strategy)
        self._has_initialized = True

    @property
    def queue(self) -> PullQueue:
        """The queue that workers ask."""
        return self._cluster.closure_queue


def is_server_failure(error: Exception) -> bool:
    """Whether an error says that a parameter server is gone or was restarted."""
    return tf_coordinator._is_ps_failure(error)
