"""A parameter server or a worker: a TensorFlow server that does what its coordinator asks."""

import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from k4p1 import quiet_tensorflow
from k4p1.cluster.network_namespace import enter_if_told
from k4p1.cluster.parent import end_with_parent
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER, ClusterSpec
from k4p1.files import run_record, status_file

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 100.0


def serve(spec: ClusterSpec, model_dir: pathlib.Path, configuration: run_record.Configuration) -> None:
    """Serves until the run is over (then it returns) or the process is stopped.

    TensorFlow's servers listen on all interfaces, without authentication: run them in a network that is closed to others.

    Args:
      spec: of this process.
      model_dir: the folder of the coordinator, on a file system that both see.
      configuration: of its gin files; see `run_record.compare`.

    Raises:
      ConfigError: another version or configuration than the run's, or a port in use.
    """
    enter_if_told()  # before the first thread
    end_with_parent(gently=False)
    if run_record.is_announced(model_dir):
        run_record.compare(model_dir, configuration)
    os.environ["GRPC_FAIL_FAST"] = "use_caller"
    quiet_tensorflow.import_quietly()
    import tensorflow as tf

    from k4p1.cluster.connection import check_port

    wait_for_run(model_dir, configuration, spec.name, spec.jobs[COORDINATOR][0])
    check_port(spec)
    before = status_file.read_if_whole(model_dir)
    workers = len(spec.jobs[WORKER])
    # Every step holds a thread of a server while it waits for the worker's gradients, and one of the worker for each server.
    threads = max(int(os.environ.get("TF_NUM_INTEROP_THREADS", 0)), workers + 2, len(spec.jobs[SERVER]) + 2)
    config = tf.compat.v1.ConfigProto(
        inter_op_parallelism_threads=threads,
        intra_op_parallelism_threads=int(os.environ.get("TF_NUM_INTRAOP_THREADS", 0)),
        device_count={"GPU": 0} if spec.job == SERVER else {},
    )
    config.gpu_options.allow_growth = True
    tf.distribute.Server(
        tf.train.ClusterSpec({job: list(addresses) for job, addresses in spec.jobs.items()}),
        job_name=spec.job,
        task_index=spec.index,
        protocol="grpc",
        config=config,
    )
    print(f"{spec.name}: serving at {spec.address} (process {os.getpid()})", flush=True)
    asked = _stop_signal()
    while not _is_over(status_file.read_if_whole(model_dir), before, stopped=bool(asked)):
        if asked and time.monotonic() - asked[0] > _GRACE_SECONDS:
            break
        time.sleep(_LOOK_SECONDS)
    print(f"{spec.name}: the run is over", flush=True)


def wait_for_run(model_dir: pathlib.Path, configuration: run_record.Configuration, who: str, coordinator: str) -> None:
    """Waits until the coordinator has begun its run, then compares."""
    if not run_record.is_announced(model_dir):
        missing = "" if model_dir.is_dir() else ", which does not exist here yet (is the shared file system mounted?)"
        print(f"{who}: waiting for the coordinator ({coordinator}) to begin its run in {model_dir}{missing}", flush=True)
        while not run_record.is_announced(model_dir):
            time.sleep(_LOOK_SECONDS)
    run_record.compare(model_dir, configuration)


def serve_and_exit(spec: ClusterSpec, model_dir: pathlib.Path, configuration: run_record.Configuration) -> NoReturn:
    """Serves, then ends the process: TensorFlow's server threads never stop."""
    serve(spec, model_dir.expanduser(), configuration)
    sys.stdout.flush()
    os._exit(0)


def _stop_signal() -> list[float]:
    """The moments of SIGTERM: where all processes get it at once, servers stay until their coordinator has saved."""
    times: list[float] = []
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: times.append(time.monotonic()))
    return times


def _is_over(status: Mapping[str, Any], before: Mapping[str, Any], stopped: bool) -> bool:
    """Whether a run has ended for good, or, if so asked, has been stopped, and left another status than the one before.

    Clocks differ between machines, and jump: only whether it is another status counts.
    """
    ends = (status_file.FINISHED, status_file.FAILED, *([status_file.STOPPED] if stopped else []))
    return status != before and status.get("state") in ends
