"""Who is who in a cluster: addresses and roles, from `TF_CONFIG`, from Slurm, or chosen on this machine."""

import dataclasses
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from k4p1 import errors, quiet_tensorflow

COORDINATOR, SERVER, WORKER = "chief", "ps", "worker"
JOBS = (COORDINATOR, SERVER, WORKER)
_NAMES = {COORDINATOR: "coordinator", SERVER: "parameter server", WORKER: "worker"}
_SHAPE = (
    "TF_CONFIG={'cluster': {'chief': ['host:port'], 'ps': [...], 'worker': [...]}, 'task': {'type': 'worker', 'index': 0}}"
)


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The addresses of a cluster and the role of this process.

    Attributes:
      jobs: addresses `host:port` of `chief` (one, the coordinator), `ps` (parameter servers) and `worker`.
      job: of this process.
      index: of this process within its job.
    """

    jobs: Mapping[str, tuple[str, ...]]
    job: str
    index: int

    @property
    def name(self) -> str:
        """The role in words."""
        return _NAMES[self.job] if self.job == COORDINATOR else f"{_NAMES[self.job]} {self.index}"

    @property
    def address(self) -> str:
        """`host:port` of this process."""
        return self.jobs[self.job][self.index]

    def as_tf_config(self) -> str:
        """The value of `TF_CONFIG`."""
        cluster = {job: list(addresses) for job, addresses in self.jobs.items()}
        return json.dumps({"cluster": cluster, "task": {"type": self.job, "index": self.index}})

    def of(self, job: str, index: int) -> "ClusterSpec":
        """The same cluster, seen by another process."""
        return dataclasses.replace(self, job=job, index=index)


def from_environment() -> ClusterSpec | None:
    """The cluster of `TF_CONFIG`, or None where it is not set.

    Raises:
      ConfigError: `TF_CONFIG` is malformed; the message says in what.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return None
    try:
        config = json.loads(text)
    except ValueError as e:
        raise errors.ConfigError(f"TF_CONFIG is no JSON ({e}); expected {_SHAPE}") from e
    if not isinstance(config, dict) or not isinstance(config.get("cluster"), dict):
        raise errors.ConfigError(f"TF_CONFIG has no 'cluster'; expected {_SHAPE}")
    for job in config["cluster"]:
        if job not in JOBS:
            raise errors.ConfigError(errors.unknown("job in TF_CONFIG", job, JOBS))
    jobs = {job: _addresses(job, config["cluster"].get(job)) for job in JOBS}
    known: dict[str, str] = {}
    for job, addresses in jobs.items():
        for index, address in enumerate(addresses):
            name = ClusterSpec(jobs, job, index).name
            if address in known:
                raise errors.ConfigError(
                    f"TF_CONFIG: {known[address]} and {name} have the same address {address}; give each its own"
                )
            known[address] = name
    if len(jobs[COORDINATOR]) > 1:
        raise errors.ConfigError(
            f"TF_CONFIG names {len(jobs[COORDINATOR])} addresses for 'chief'; a cluster has one coordinator"
        )
    task = config.get("task")
    if not isinstance(task, dict) or task.get("type") not in JOBS:
        raise errors.ConfigError(f"TF_CONFIG has no task type of {', '.join(JOBS)}; expected {_SHAPE}")
    job, index = task["type"], task.get("index", 0)
    if not isinstance(index, int) or not 0 <= index < len(jobs[job]):
        raise errors.ConfigError(f"TF_CONFIG: task index {index!r} of '{job}'; allowed are 0 to {len(jobs[job]) - 1}")
    return ClusterSpec(jobs, job, index)


def _addresses(job: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given:
        raise errors.ConfigError(f"TF_CONFIG names no address for '{job}'; expected {_SHAPE}")
    for address in given:
        match = re.fullmatch(r"(.+):(\d{1,5})", address) if isinstance(address, str) else None
        if not match or not 0 < int(match[2]) < 65536:
            raise errors.ConfigError(f"TF_CONFIG: address {address!r} of '{job}'; expected 'host:port'")
    return tuple(given)


def parse_counts(text: str, flag: str, expected: Sequence[str]) -> dict[str, int]:
    """`"ps:1,workers:2"` as `{"ps": 1, "worker": 2}`.

    Args:
      text: counts.
      flag: where it was given, for messages.
      expected: the jobs that must be named, of `ps` and `worker`.

    Raises:
      ConfigError: malformed, a job missing or named twice, or a count below 1.
    """
    example = ",".join({SERVER: "ps:1", WORKER: "workers:2"}[job] for job in expected)
    counts: dict[str, int] = {}
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(ps|workers?)\s*[:=]\s*(\d+)\s*", part)
        job = match and (SERVER if match[1] == "ps" else WORKER)
        if job is None or job in counts or job not in expected or int(match[2]) < 1:
            raise errors.ConfigError(f"{flag}={text!r}: expected counts of 1 or more, such as {example}")
        counts[job] = int(match[2])
    for job in expected:
        if job not in counts:
            raise errors.ConfigError(f"{flag}={text!r} does not say how many {job}; expected {example}")
    return counts


def on_this_machine(servers: int, workers: int) -> ClusterSpec:
    """A cluster on free ports of 127.0.0.1, seen by its coordinator."""
    sockets = [socket.socket() for _ in range(1 + servers + workers)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = tuple(f"127.0.0.1:{each.getsockname()[1]}" for each in sockets)
    for each in sockets:
        each.close()
    jobs = {COORDINATOR: addresses[:1], SERVER: addresses[1 : 1 + servers], WORKER: addresses[1 + servers :]}
    return ClusterSpec(jobs, COORDINATOR, 0)


def from_slurm(servers: int, port: int = 8888) -> ClusterSpec:
    """The cluster of a Slurm job step: the first task is the coordinator, the next `servers` serve, all others work.

    `tf.distribute.cluster_resolver.SlurmClusterResolver` reads the step's variables. Processes of one node take ports from
    `port` on. With GPUs (`SLURM_GPUS_ON_NODE`) the tasks of a node share them evenly.

    Raises:
      ConfigError: not within a job step, or too few tasks.
    """
    quiet_tensorflow.import_quietly()
    import tensorflow as tf

    tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    if tasks is None or not tasks.isdigit():
        raise errors.ConfigError("--slurm needs a Slurm job step (SLURM_STEP_NUM_TASKS is not set); start it with srun")
    workers = int(tasks) - 1 - servers
    if workers < 1:
        raise errors.ConfigError(
            f"the Slurm step has {tasks} tasks; a coordinator, {servers} parameter servers and a worker need {servers + 2}"
        )
    jobs = {COORDINATOR: 1, SERVER: servers, WORKER: workers}
    slurm_resolver = tf.distribute.cluster_resolver.SlurmClusterResolver
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0)
    try:
        if gpus:
            resolver = slurm_resolver(jobs, port_base=port, gpus_per_node=gpus)
        else:  # the resolver divides by the number of GPUs per task: pretend one each, and leave devices alone
            resolver = slurm_resolver(jobs, port_base=port, gpus_per_node=int(tasks), gpus_per_task=1, auto_set_gpu=False)
        found = resolver.cluster_spec().as_dict()
    except (RuntimeError, ValueError, KeyError) as e:
        raise errors.ConfigError(f"Slurm: {str(e).splitlines()[0]}") from e
    job, index = resolver.get_task_info()
    return ClusterSpec({job: tuple(found[job]) for job in JOBS}, job, index)
