"""Kubernetes manifests of a cluster run: plain objects, one YAML text."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from k4p1 import errors
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER, ClusterSpec

_ROLE = "k4p1/role"
_RUN = "k4p1/run"
_RETRIES = 20
_SECONDS_TO_SAVE = 120
_NAMES = {COORDINATOR: "coordinator", SERVER: "ps", WORKER: "worker"}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What every pod requests.

    Attributes:
      cpu: CPUs, such as `"2"` or `"500m"`.
      memory: such as `"4Gi"`.
      gpus: of each worker (`nvidia.com/gpu`).
    """

    cpu: str = "2"
    memory: str = "4Gi"
    gpus: int = 0

    def __post_init__(self):
        if not re.fullmatch(r"\d+(\.\d+)?m?", self.cpu):
            raise errors.ConfigError(f"cpu={self.cpu!r}: expected a number of CPUs, such as 2 or 500m")
        if not re.fullmatch(r"\d+(\.\d+)?([KMGTP]i?)?", self.memory):
            raise errors.ConfigError(f"memory={self.memory!r}: expected bytes, such as 4Gi or 500M")


@dataclasses.dataclass(frozen=True)
class ClusterJob:
    """A run on a cluster.

    Attributes:
      name: of the run; names all objects.
      image: container image with k4p1 installed.
      command: `train` or `finetune`.
      flags: `--gin_file` and `--gin_bindings` of all processes.
      model_dir: where the shared volume is mounted.
      claim: PersistentVolumeClaim of that volume, ReadWriteMany.
      servers, workers: how many.
      port: of every pod.
      resources: of every pod.

    Raises:
      ConfigError: a name that Kubernetes does not allow, or a path that is not absolute.
    """

    name: str
    image: str
    command: str
    flags: Sequence[str]
    model_dir: str
    claim: str
    servers: int
    workers: int
    port: int = 2222
    resources: Resources = Resources()

    def __post_init__(self):
        for field in ("name", "claim"):
            value = getattr(self, field)
            if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", value):
                raise errors.ConfigError(
                    f"{field}={value!r}: expected up to 42 lower case letters, digits and '-', a letter first"
                )
        if not self.model_dir.startswith("/"):
            raise errors.ConfigError(f"model_dir={self.model_dir!r}: expected an absolute path in the pods")


def manifests(job: ClusterJob) -> str:
    """The objects as YAML: Service, NetworkPolicy, StatefulSets of servers and workers, Job of the coordinator.

    `kubectl apply -f` starts the run; the Job completes with it, and `kubectl delete -f` removes everything but the volume.
    """
    comment = (
        f"# k4p1 run '{job.name}': {job.servers} parameter servers, {job.workers} workers, one coordinator.\n"
        "# TensorFlow's servers have no authentication: the NetworkPolicy lets only pods of this run reach them, and\n"
        "# works where the network plugin of the cluster enforces such policies.\n"
        f"# Needs: image {job.image}; PersistentVolumeClaim '{job.claim}' (ReadWriteMany).\n"
    )
    return comment + yaml.safe_dump_all(objects(job), sort_keys=False, width=120)


def objects(job: ClusterJob) -> list[dict[str, Any]]:
    """The objects as plain values."""
    return [
        _service(job),
        _network_policy(job),
        _stateful_set(job, SERVER, job.servers),
        _stateful_set(job, WORKER, job.workers),
        _coordinator(job),
    ]


def _labels(job: ClusterJob, role: str | None = None) -> dict[str, str]:
    return {_RUN: job.name} | ({_ROLE: _NAMES[role]} if role else {})


def _metadata(job: ClusterJob, name: str) -> dict[str, Any]:
    return {"name": name, "labels": _labels(job)}


def _service(job: ClusterJob) -> dict[str, Any]:
    """Headless: it only gives the pods names. Pods have them before they are ready, since all wait for each other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, job.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _labels(job),
            "ports": [{"name": "grpc", "port": job.port}],
        },
    }


def _network_policy(job: ClusterJob) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job, job.name),
        "spec": {
            "podSelector": {"matchLabels": _labels(job)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": _labels(job)}}],
                    "ports": [{"protocol": "TCP", "port": job.port}],
                }
            ],
        },
    }


def _stateful_set(job: ClusterJob, role: str, replicas: int) -> dict[str, Any]:
    name = f"{job.name}-{_NAMES[role]}"
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _metadata(job, name),
        "spec": {
            "serviceName": job.name,
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": _labels(job, role)},
            "template": {
                "metadata": {"labels": _labels(job, role)},
                "spec": _pod(job, role, ["join"], restart="Always"),
            },
        },
    }


def _coordinator(job: ClusterJob) -> dict[str, Any]:
    name = f"{job.name}-{_NAMES[COORDINATOR]}"
    pod = _pod(job, COORDINATOR, [job.command], restart="Never")
    cannot_run = {"containerName": "k4p1", "operator": "In", "values": [1, 2]}  # settings or data: no use in trying again
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, name),
        "spec": {
            "backoffLimit": _RETRIES,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": cannot_run}]},
            "template": {
                "metadata": {"labels": _labels(job, COORDINATOR)},
                "spec": {**pod, "hostname": name, "subdomain": job.name},
            },
        },
    }


def _pod(job: ClusterJob, role: str, command: list[str], restart: str) -> dict[str, Any]:
    """The role's index is the ordinal at the end of the pod's name."""
    container: dict[str, Any] = {
        "name": "k4p1",
        "image": job.image,
        "command": ["/bin/sh", "-c", _SET_TF_CONFIG + 'exec k4p1 "$@"', "k4p1"],
        "args": [*command, f"--model_dir={job.model_dir}", *job.flags],
        "env": [
            {"name": "TF_CONFIG_TEMPLATE", "value": _template(job, role)},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "ports": [{"name": "grpc", "containerPort": job.port}],
        "resources": _resources(job, role),
        "volumeMounts": [{"name": "model", "mountPath": job.model_dir, "subPath": job.name}],
    }
    return {
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": _SECONDS_TO_SAVE,
        "containers": [container],
        "volumes": [{"name": "model", "persistentVolumeClaim": {"claimName": job.claim}}],
    }


_SET_TF_CONFIG = 'export TF_CONFIG="$(echo "$TF_CONFIG_TEMPLATE" | sed "s/__INDEX__/${POD_NAME##*-}/")"; '


def _template(job: ClusterJob, role: str) -> str:
    """`TF_CONFIG` with the index of the process to fill in."""

    def addresses(of: str, count: int) -> tuple[str, ...]:
        name = f"{job.name}-{_NAMES[of]}"
        hosts = [name] if of == COORDINATOR else [f"{name}-{i}" for i in range(count)]
        return tuple(f"{host}.{job.name}:{job.port}" for host in hosts)

    jobs = {
        COORDINATOR: addresses(COORDINATOR, 1),
        SERVER: addresses(SERVER, job.servers),
        WORKER: addresses(WORKER, job.workers),
    }
    config = json.loads(ClusterSpec(jobs, role, 0).as_tf_config())
    if role == COORDINATOR:
        return json.dumps(config)
    config["task"]["index"] = "__INDEX__"
    return json.dumps(config).replace('"__INDEX__"', "__INDEX__")


def _resources(job: ClusterJob, role: str) -> dict[str, Any]:
    requests: dict[str, Any] = {"cpu": job.resources.cpu, "memory": job.resources.memory}
    limits: dict[str, Any] = {"memory": job.resources.memory}
    if role == WORKER and job.resources.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(job.resources.gpus)
    return {"requests": requests, "limits": limits}
