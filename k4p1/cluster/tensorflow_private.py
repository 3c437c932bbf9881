"""All that k4p1 uses of TensorFlow's private modules: a coordinator whose workers ask for their next step.

`tf.distribute.coordinator.ClusterCoordinator` has one queue from which any worker takes any function. Here every worker asks
a `Dispatcher` what to do next, so that a task's steps run on its worker group alone, nothing waits in a queue, and
assignments may change at any moment. All else (datasets on workers, detecting and recovering lost workers) is TensorFlow's.

`tests/cluster/test_tensorflow_private.py` checks every private name used here; `setup.py` pins TensorFlow's versions.
"""

import threading
from collections.abc import Container
from typing import Any, Protocol

import tensorflow as tf
from tensorflow.python.distribute.coordinator import cluster_coordinator as tf_coordinator
from tensorflow.python.eager import context as tf_context


class Dispatcher(Protocol):
    """Decides on steps and is notified of their outcome. All methods are called from the threads of workers."""

    def next_step(self, worker: int) -> "Step | None":
        """What a worker does next; None: nothing now. The queue is locked: be quick, and run no operations."""

    def finished(self, step: "Step", worker: int, result: Any) -> None:
        """A step returned; None: it was refused a ticket (`Store.take_ticket`), or data."""

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
        _own_executor(worker)
        try:
            self._run_on(worker)
            result = value.fetch()
        except tf.errors.OutOfRangeError:
            # No ticket is left; or no data, which looks alike: the ticket's failure also ends the data of the step.
            worker.executor.clear_error()
            result = None
        except Exception as e:
            worker.executor.clear_error()
            if not (isinstance(e, tf.errors.CancelledError) and "Iterator was cancelled" in str(e)):
                e.k4p1_task, e.k4p1_worker = self.task, worker.worker_index
                raise
            result = None  # the same, reported by the data that the ticket's failure cancelled
        self.dispatcher.finished(self, worker.worker_index, result)

    def _run_on(self, worker: tf_coordinator.Worker) -> None:
        """As `Closure.execute_on`, without `executor_scope`; see `_own_executor`."""
        args = tf_coordinator._select_worker_slice(worker.worker_index, self._args)
        error = tf_coordinator._get_error_from_remote_values(args)
        if error:
            raise error if isinstance(error, tf_coordinator.ClosureInputError) else tf_coordinator.ClosureInputError(error)
        context = tf_coordinator.coordinator_context
        with tf.device(worker.device_name), context.with_dispatch_context(worker):
            values = self._function(*tf.nest.map_structure(context.maybe_get_remote_value, args))
        self.maybe_call_with_output_remote_value(lambda remote: remote._set_values(values))


_threads = threading.local()


def _own_executor(worker: tf_coordinator.Worker) -> None:
    """Gives the thread of a worker that worker's executor for good.

    `executor_scope` otherwise wraps the executor that all threads share, and the wrapper's end waits for whatever is pending
    there: a worker that has fallen silent would stop all.
    """
    if getattr(_threads, "executor", None) is not worker.executor:
        tf_context.context().executor = _threads.executor = worker.executor


class PullQueue(tf_coordinator._CoordinatedClosureQueue):
    """A queue of no length: `get` asks the dispatcher.

    Attributes:
      dispatcher: None issues no steps, and those in flight are not reported.
    """

    def __init__(self):
        super().__init__()
        self.dispatcher: Dispatcher | None = None
        self._paused = False
        self._at_work: dict[int, int] = {}

    def get(self, timeout: float | None = None, tag: int | None = None) -> tf_coordinator.Closure | None:
        with self._queue_lock:
            while self._should_process_closures:
                if not self._tagged_queue[tag].empty():  # datasets of this worker come first
                    return self._tagged_queue[tag].get(block=False)
                step = self._next_step(tag)
                if step is not None:
                    step.worker = _threads.worker = tag
                    self._at_work[tag] = self._at_work.get(tag, 0) + 1
                    self.inflight_closure_count += 1
                    return step
                if not self._closures_queued_condition.wait(timeout=timeout) and timeout is not None:
                    return None
            return None

    def _next_step(self, worker: int) -> Step | None:
        if self._paused or self.dispatcher is None:
            return None
        try:
            return self.dispatcher.next_step(worker)
        except Exception as e:  # it belongs to the dispatcher, and must not end the worker's thread
            self.dispatcher.failed(e)
            return None

    def wake(self) -> None:
        """Makes idle workers ask again."""
        with self._queue_lock:
            self._closures_queued_condition.notify_all()

    def pause(self, timeout: float, without: Container[int] = ()) -> bool:
        """Issues no more steps, and waits for those in flight; False if some did not return in time.

        Args:
          timeout: seconds.
          without: workers that are not waited for.
        """
        with self._queue_lock:
            self._paused = True
            return self._no_inflight_closure_condition.wait_for(
                lambda: all(worker in without for worker in self._at_work), timeout
            )

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
        worker = _threads.worker
        self._at_work[worker] -= 1
        if not self._at_work[worker]:
            del self._at_work[worker]
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

    def forget_failures(self) -> None:
        """After progress: TensorFlow's counts of passing failures begin again; they would add up over a long run."""
        with self._cluster._potential_ps_failures_lock:
            self._cluster._potential_ps_failures_count = [0] * self._cluster._num_ps
        with self._cluster._transient_timeouts_lock:
            self._cluster._transient_timeouts_count = 0


def free_soon(seconds: int) -> None:
    """For a process that is yet to connect: servers and workers free what it placed there so long after it has died.

    TensorFlow's ten minutes add up where coordinators are replaced.
    """
    tf_context._KEEP_ALIVE_SECS = seconds
    for function in (tf_context.Context.set_server_def, tf_context.Context.update_server_def):
        function.__defaults__ = (seconds,)


def has_started() -> bool:
    """Whether TensorFlow runs in this process: a copy of the process could then not use it."""
    return tf_context.context()._initialized


def is_server_failure(error: Exception) -> bool:
    """Whether an error says that a parameter server is gone or was restarted."""
    return tf_coordinator._is_ps_failure(error)
