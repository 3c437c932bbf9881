"""The coordinator's connection to its servers and workers."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable

import tensorflow as tf

from k4p1 import errors
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER, ClusterSpec
from k4p1.cluster.tensorflow_private import PullCoordinator

_LOOK_SECONDS = 0.25
_SILENT_SECONDS = 2.0


class Connection:
    """Waits for all servers and workers, then connects; there is one per process, for as long as it lives.

    Variables that TensorFlow made before are lost with the connection, so it comes first.

    Args:
      spec: the cluster, seen by its coordinator.
      startup_timeout_s: how long to wait.
      tell: told for whom it waits, each time that this changes; at the end nobody (an empty text).

    Attributes:
      coordinator: asks workers to take steps.
      devices: the CPUs of the parameter servers.
      workers: how many there are.

    Raises:
      ClusterError: no process answers at some address; names it.
    """

    def __init__(self, spec: ClusterSpec, startup_timeout_s: float, tell: Callable[[str], None] = lambda whom: None):
        wait_for(spec, startup_timeout_s, tell)
        os.environ["GRPC_FAIL_FAST"] = "use_caller"
        tf.get_logger().setLevel("CRITICAL")  # lost workers are reported by k4p1 itself
        jobs = {job: list(addresses) for job, addresses in spec.jobs.items()}
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(jobs), task_type=COORDINATOR, task_id=0, rpc_layer="grpc"
        )
        self.coordinator = PullCoordinator(tf.distribute.ParameterServerStrategy(resolver))
        self.devices = [f"/job:{SERVER}/replica:0/task:{i}/device:CPU:0" for i in range(len(spec.jobs[SERVER]))]
        self.workers = len(spec.jobs[WORKER])


def check_port(spec: ClusterSpec) -> None:
    """Makes sure that this process can listen at its address; two TensorFlow servers would share a port silently.

    Raises:
      ConfigError: the port is in use.
    """
    port = int(spec.address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as e:
            raise errors.ConfigError(f"{spec.name}: port {port} of {spec.address} cannot be used ({e.strerror})") from e


def wait_for(spec: ClusterSpec, startup_timeout_s: float, tell: Callable[[str], None] = lambda whom: None) -> None:
    """Waits until somebody listens at every address of servers and workers; one line says for whom, and `tell` is told.

    Raises:
      ClusterError: none does after `startup_timeout_s` seconds.
    """
    missing = [spec.of(job, i) for job in (SERVER, WORKER) for i in range(len(spec.jobs[job]))]
    start, told, names = time.monotonic(), False, ""
    while missing := [one for one in missing if not _listens(one.address)]:
        waited = time.monotonic() - start
        if waited > startup_timeout_s:
            raise errors.ClusterError(
                f"no answer from {_names(missing)} after {waited:.0f} s; start it or fix the address, then try again"
            )
        if names != (names := _names(missing)):
            tell(names)
        if not told and waited > _SILENT_SECONDS:
            told = True
            print(f"waiting for {_names(missing)}", file=sys.stderr, flush=True)
        time.sleep(_LOOK_SECONDS)
    tell("")


def _names(specs: Iterable[ClusterSpec]) -> str:
    return ", ".join(f"{spec.name} ({spec.address})" for spec in specs)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
            return True
    except OSError:
        return False
