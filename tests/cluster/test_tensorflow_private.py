"""A contract: every private name of TensorFlow that `k4p1.cluster.tensorflow_private` uses is there, in its known shape.

When one of these fails after an update of TensorFlow, that file is the only one to mend.
"""

import ast
import inspect
import pathlib
import threading
import types

import pytest
from tensorflow.python.distribute.coordinator import cluster_coordinator as tf_coordinator
from tensorflow.python.eager import context as tf_context
from tensorflow.python.eager import executor as tf_executor

import k4p1
from k4p1.cluster import tensorflow_private

PACKAGE = pathlib.Path(k4p1.__file__).parent


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Closure.__init__", "self function cancellation_mgr args kwargs"),
        ("Closure.build_output_remote_value", "self"),
        ("Closure.execute_on", "self worker"),
        ("_select_worker_slice", "worker_id structured"),
        ("_get_error_from_remote_values", "structure"),
        ("ClosureInputError.__init__", "self original_exception"),
        ("coordinator_context.with_dispatch_context", "worker_obj"),
        ("coordinator_context.maybe_get_remote_value", "val"),
        ("Closure.maybe_call_with_output_remote_value", "self method"),
        ("_CoordinatedClosureQueue.__init__", "self"),
        ("_CoordinatedClosureQueue.put", "self closure tag"),
        ("_CoordinatedClosureQueue.get", "self timeout tag"),
        ("_CoordinatedClosureQueue.mark_finished", "self"),
        ("_CoordinatedClosureQueue.mark_failed", "self e"),
        ("_CoordinatedClosureQueue.put_back", "self closure"),
        ("_CoordinatedClosureQueue.wait", "self timeout"),
        ("_CoordinatedClosureQueue.done", "self"),
        ("_CoordinatedClosureQueue.stop", "self"),
        ("_CoordinatedClosureQueue.clear_tag_unlocked", "self tag"),
        ("Cluster.__init__", "self strategy"),
        ("ClusterCoordinator.__init__", "self strategy"),
        ("ClusterCoordinator.create_per_worker_dataset", "self dataset_fn"),
        ("Worker._process_closure", "self closure"),
        ("Worker._process_queue", "self"),
        ("_is_ps_failure", "error"),
    ],
)
def test_signatures(name, parameters):
    target = tf_coordinator
    for part in name.split("."):
        target = getattr(target, part)
    assert " ".join(inspect.signature(target).parameters) == parameters


def test_attributes_of_the_queue():
    queue = tf_coordinator._CoordinatedClosureQueue()
    for name in (
        "_queue_lock",
        "_closures_queued_condition",
        "_no_inflight_closure_condition",
        "_should_process_closures",
        "_tagged_queue",
        "_cancellation_mgr",
        "_inflight_closure_count",
        "inflight_closure_count",
        "_watchdog",
    ):
        assert hasattr(queue, name), name
    queue.stop()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (tf_coordinator.Cluster.__init__, "self.closure_queue = _CoordinatedClosureQueue()"),
        (tf_coordinator.ClusterCoordinator.__init__, "self._cluster = Cluster(strategy)"),
        (tf_coordinator.ClusterCoordinator.__init__, "self.strategy.extended._used_with_coordinator = True"),
        (tf_coordinator.Closure.__init__, "self._concrete_function = function"),
        (tf_coordinator.Closure.build_output_remote_value, "self._output_remote_value_ref is None"),
        (tf_coordinator.Worker._process_queue, "closure_queue.get(tag=self.worker_index)"),
        (tf_coordinator.Worker._process_closure, "closure.execute_on(self)"),
        (tf_coordinator.Worker._process_closure, "self._cluster.closure_queue.mark_failed(e)"),
        (tf_coordinator.Closure.execute_on, "with coordinator_context.with_dispatch_context(worker):"),
        (tf_coordinator.Worker.__init__, "self.executor = executor.new_executor(enable_async=False)"),
        (tf_coordinator.Cluster.__init__, "self._potential_ps_failures_count = [0] * self._num_ps"),
        (tf_coordinator.Cluster.__init__, "self._transient_timeouts_count = 0"),
        (tf_coordinator.Worker._on_closure_failure, "closure_queue.put_back(closure)"),
    ],
)
def test_what_the_subclasses_rely_on(function, text):
    assert text in inspect.getsource(function)


def test_the_context_has_an_executor_for_each_thread():
    assert isinstance(tf_context.Context.executor, property) and tf_context.Context.executor.fset is not None
    assert tf_context.context()._initialized in (True, False)
    assert hasattr(tf_executor.new_executor(enable_async=False), "clear_error")


@pytest.mark.parametrize("name", ["set_server_def", "update_server_def"])
def test_the_time_after_which_a_dead_coordinator_is_forgotten_is_a_default(name):
    function = getattr(tf_context.Context, name)
    assert list(inspect.signature(function).parameters) == ["self", "server_def", "keep_alive_secs"]
    assert len(function.__defaults__) == 1 and hasattr(tf_context, "_KEEP_ALIVE_SECS")


def test_no_other_file_touches_private_modules():
    for path in PACKAGE.rglob("*.py"):
        if path.name == pathlib.Path(tensorflow_private.__file__).name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("tensorflow.python") for name in names), path


def test_a_queue_that_is_paused_gives_out_nothing():
    class Asked:
        def next_step(self, worker):
            raise AssertionError("asked during a pause")

    queue = tensorflow_private.PullQueue()
    queue.dispatcher = Asked()
    assert queue.pause(timeout=1.0)
    assert queue.get(timeout=0.05, tag=0) is None
    queue.stop()


def test_a_pause_waits_for_all_but_those_who_are_given_up():
    class Gives:
        def next_step(self, worker):
            return types.SimpleNamespace(worker=None)

    queue = tensorflow_private.PullQueue()
    queue.dispatcher = Gives()
    threads = [threading.Thread(target=queue.get, kwargs={"tag": worker}) for worker in (0, 1)]
    for thread in threads:
        thread.start()
        thread.join()
    assert not queue.pause(0.01, without={1})
    assert queue.pause(0.01, without={0, 1})
    queue.stop()


def test_a_dispatcher_that_fails_does_not_end_its_worker():
    class Fails:
        errors = ()

        def next_step(self, worker):
            raise ValueError("its own mistake")

        def failed(self, error):
            self.errors += (str(error),)

    queue = tensorflow_private.PullQueue()
    queue.dispatcher = Fails()
    assert queue.get(timeout=0.01, tag=0) is None
    assert queue.dispatcher.errors == ("its own mistake",)
    queue.stop()
