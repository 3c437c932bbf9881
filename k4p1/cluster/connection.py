"""The coordinator's connection to its servers and workers."""

import concurrent.futures
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

import tensorflow as tf

from k4p1 import errors
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER, ClusterSpec
from k4p1.cluster.tensorflow_private import PullCoordinator, free_soon

_LOOK_SECONDS = 0.25
_SILENT_SECONDS = 2.0
_KEEP_ALIVE_SECONDS = 120
_PROBE_SECONDS = 2.0
_MOST_PROBES = 32
_MOST_NAMES = 12
_HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS = 4
_NOBODY = ": nobody listens"


class Connection:
    """Waits for servers and workers, then connects; there is one per process, for as long as it lives.

    Variables that TensorFlow made before are lost with the connection, so it comes first.

    Args:
      spec: the cluster, seen by its coordinator.
      startup_timeout_s: how long to wait.
      spare_s: after so many seconds it goes on without the workers that do not answer; None waits for all.
      tell: prints a line.
      waits: told for whom it waits, each time that this changes; at the end nobody (an empty text).

    Attributes:
      coordinator: asks workers to take steps.
      devices: the CPUs of the parameter servers.
      workers: how many there are, absent ones included.
      present: the workers that are connected, in TensorFlow's order.

    Raises:
      ClusterError: no process answers at some address; names it.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        startup_timeout_s: float,
        spare_s: float | None = None,
        tell: Callable[[str], None] | None = None,
        waits: Callable[[str], None] = lambda whom: None,
    ):
        self.present = wait_for(spec, startup_timeout_s, spare_s, tell, waits)
        os.environ["GRPC_FAIL_FAST"] = "use_caller"
        free_soon(_KEEP_ALIVE_SECONDS)
        tf.get_logger().setLevel("CRITICAL")  # lost workers are reported by k4p1 itself
        jobs = {job: list(addresses) for job, addresses in spec.jobs.items()}
        self.workers = len(jobs[WORKER])
        jobs[WORKER] = [jobs[WORKER][worker] for worker in self.present]
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(jobs), task_type=COORDINATOR, task_id=0, rpc_layer="grpc"
        )
        self.coordinator = PullCoordinator(tf.distribute.ParameterServerStrategy(resolver))
        self.devices = [f"/job:{SERVER}/replica:0/task:{i}/device:CPU:0" for i in range(len(spec.jobs[SERVER]))]


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


def wait_for(
    spec: ClusterSpec,
    startup_timeout_s: float,
    spare_s: float | None = None,
    tell: Callable[[str], None] | None = None,
    waits: Callable[[str], None] = lambda whom: None,
) -> list[int]:
    """Waits until a server of ours answers at every address; one line says for whom, and `waits` is told.

    Returns the workers that answer.

    Whoever accepts connections and says nothing (a stopped process, a hung machine) does not answer; nor does another
    service.

    Raises:
      ClusterError: some do not after `startup_timeout_s` seconds, or no worker does after `spare_s`; says why.
    """
    tell = tell or _print
    members = [spec.of(job, i) for job in (SERVER, WORKER) for i in range(len(spec.jobs[job]))]
    start, told, names = time.monotonic(), False, ""
    with concurrent.futures.ThreadPoolExecutor(min(_MOST_PROBES, len(members))) as pool:
        while True:
            reasons = list(pool.map(lambda one: silence_of(one.address), members))
            missing = [(one, reason) for one, reason in zip(members, reasons, strict=True) if reason]
            present = [one.index for one, reason in zip(members, reasons, strict=True) if one.job == WORKER and not reason]
            waited = time.monotonic() - start
            if names != (names := _names(missing)):
                waits(names)
            if not missing:
                return present
            only_workers = all(one.job == WORKER for one, _ in missing)
            if spare_s is not None and waited > spare_s and only_workers and present:
                tell(f"continuing without {_names(missing)}")
                waits("")
                return present
            if waited > startup_timeout_s:
                raise errors.ClusterError(
                    f"no answer from {_names(missing)} after {waited:.0f} s; start it or fix the address, then try again"
                )
            if waited >= _SILENT_SECONDS and not told:
                told = True
                tell(f"waiting for {_names(missing)}")
            time.sleep(_LOOK_SECONDS)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _names(members: Sequence[tuple[ClusterSpec, str]]) -> str:
    more = f" and {len(members) - _MOST_NAMES} others" if len(members) > _MOST_NAMES else ""
    return ", ".join(f"{spec.name} ({spec.address}{reason})" for spec, reason in members[:_MOST_NAMES]) + more


def silence_of(address: str) -> str:
    """Why no server of ours is at an address, as the end of a clause; empty if one answers there within two seconds."""
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS)
    except OSError:
        return _NOBODY
    head = b""
    with connection:
        try:
            connection.settimeout(_PROBE_SECONDS)
            connection.sendall(_HTTP_2)
            while len(head) < 9 and (part := connection.recv(9 - len(head))):
                head += part
        except TimeoutError:
            return ": another service answers there" if head else ": accepts connections, and is silent"
        except OSError:
            return _NOBODY
    speaks = len(head) == 9 and head[3] == _SETTINGS
    return "" if speaks else ": another service answers there"
