"""A contract: every private name of TensorFlow that `k4p1.cluster.tensorflow_private` uses is there, in its known shape.

When one of these fails after an update of TensorFlow, that file is the only one to mend.
"""

import ast
import inspect
import pathlib

import pytest
from tensorflow.python.distribute.coordinator import cluster_coordinator as tf_coordinator

import k4p1
from k4p1.cluster import tensorflow_private

PACKAGE = pathlib.Path(k4p1.__file__).parent


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Closure.__init__", "self function cancellation_mgr args kwargs"),
        ("Closure.build_output_remote_value", "self"),
        ("Closure.execute_on", "self worker"),
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
        (tf_coordinator.Worker._on_closure_failure, "closure_queue.put_back(closure)"),
    ],
)
def test_what_the_subclasses_rely_on(function, text):
    assert text in inspect.getsource(function)


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
