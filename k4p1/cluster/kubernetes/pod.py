"""The pod of a role: what it runs, what it may use and do, how Kubernetes sees that it is well."""

import json
from typing import Any

from k4p1.cluster.kubernetes.cluster_job import CONFIG_PATH, ROLE_NAMES, ClusterJob
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER, ClusterSpec
from k4p1.files import run_lock

_SECONDS_TO_SAVE = 120
_START_TRIES, _START_SECONDS = 360, 10
_SET_TF_CONFIG = (
    'TF_CONFIG="$(echo "$TF_CONFIG_TEMPLATE" | sed "s/__INDEX__/${JOB_COMPLETION_INDEX:-0}/")"; export TF_CONFIG; '
)


def pod(job: ClusterJob, role: str, command: str) -> dict[str, Any]:
    """The pod's specification; the role's index is the completion index of its Job.

    The root file system cannot be written: there are the model directory, `/tmp` and `/dev/shm`.
    """
    scheduling, node = job.scheduling, {}
    if scheduling.node_selector:
        node["nodeSelector"] = dict(one.split("=", 1) for one in scheduling.node_selector)
    if scheduling.tolerations:
        node["tolerations"] = [_toleration(one) for one in scheduling.tolerations]
    if scheduling.pull_secrets:
        node["imagePullSecrets"] = [{"name": one} for one in scheduling.pull_secrets]
    return {
        "restartPolicy": "Never",
        "subdomain": job.name,
        "terminationGracePeriodSeconds": _SECONDS_TO_SAVE,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": job.user,
            "runAsGroup": job.user,
            "fsGroup": job.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **node,
        "containers": [_container(job, role, command)],
        "volumes": _volumes(job),
    }


def _container(job: ClusterJob, role: str, command: str) -> dict[str, Any]:
    data = [{"name": "TFDS_DATA_DIR", "value": job.data_path}] if job.data_claim else []
    return {
        "name": "k4p1",
        "image": job.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": CONFIG_PATH,
        "command": ["/bin/sh", "-c", _SET_TF_CONFIG + 'exec k4p1 "$@"', "k4p1"],
        "args": [command, f"--model_dir={job.model_dir}", *job.flags],
        "env": [
            {"name": "TF_CONFIG_TEMPLATE", "value": _template(job, role)},
            {"name": "HOME", "value": "/tmp"},
            {"name": "K4P1_OFFLINE", "value": "1"},
            {"name": "MPLCONFIGDIR", "value": "/tmp"},
            *data,
        ],
        "ports": [{"name": "grpc", "containerPort": job.port}],
        "resources": _resources(job, role),
        "securityContext": {
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
        **_probes(job, role),
        "volumeMounts": _mounts(job),
    }


def _probes(job: ClusterJob, role: str) -> dict[str, Any]:
    """Servers and workers listen once the coordinator has begun the run; of the coordinator, whether its folder answers.

    The coordinator has no port that is always open: it restarts itself after a lost server.
    """
    if role == COORDINATOR:
        look = {"exec": {"command": ["test", "-e", f"{job.model_dir}/{run_lock.NAME}"]}, "timeoutSeconds": 30}
    else:
        look = {"tcpSocket": {"port": "grpc"}, "timeoutSeconds": 10}
    return {
        "startupProbe": {**look, "periodSeconds": _START_SECONDS, "failureThreshold": _START_TRIES},
        "livenessProbe": {**look, "periodSeconds": 60, "failureThreshold": 5},
        "readinessProbe": {**look, "periodSeconds": 30, "failureThreshold": 2},
    }


def _resources(job: ClusterJob, role: str) -> dict[str, Any]:
    resources = job.resources
    requests: dict[str, Any] = {"cpu": resources.cpu, "memory": resources.memory}
    limits: dict[str, Any] = {"memory": resources.memory}
    if resources.cpu_limit:
        limits["cpu"] = resources.cpu_limit
    if role == WORKER and resources.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(resources.gpus)
    return {"requests": requests, "limits": limits}


def _mounts(job: ClusterJob) -> list[dict[str, Any]]:
    mounts = [
        {"name": "model", "mountPath": job.model_dir, "subPath": job.name},
        {"name": "gin", "mountPath": CONFIG_PATH, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    return mounts + ([{"name": "data", "mountPath": job.data_path, "readOnly": True}] if job.data_claim else [])


def _volumes(job: ClusterJob) -> list[dict[str, Any]]:
    items = [{"key": key, "path": path} for path, key in config_keys(job).items()]
    volumes: list[dict[str, Any]] = [
        {"name": "model", "persistentVolumeClaim": {"claimName": job.claim}},
        {"name": "gin", "configMap": {"name": config_name(job), "items": items}},
        {"name": "tmp", "emptyDir": {"sizeLimit": job.resources.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.resources.shared_memory}},
    ]
    data = {"name": "data", "persistentVolumeClaim": {"claimName": job.data_claim, "readOnly": True}}
    return volumes + ([data] if job.data_claim else [])


def config_name(job: ClusterJob) -> str:
    """The name of the ConfigMap with the gin files."""
    return f"{job.name}-gin"


def config_keys(job: ClusterJob) -> dict[str, str]:
    """The key of each gin file in the ConfigMap: keys have no slashes."""
    return {path: path.replace("/", "__") for path in job.config}


def _toleration(text: str) -> dict[str, str]:
    taint, _, effect = text.rpartition(":")
    key, equals, value = taint.partition("=")
    return {"key": key, **({"operator": "Equal", "value": value} if equals else {"operator": "Exists"}), "effect": effect}


def _template(job: ClusterJob, role: str) -> str:
    """`TF_CONFIG` with the index of the process to fill in."""

    def addresses(of: str, count: int) -> tuple[str, ...]:
        return tuple(f"{job.name}-{ROLE_NAMES[of]}-{i}.{job.name}:{job.port}" for i in range(count))

    counts = {COORDINATOR: 1, SERVER: job.servers, WORKER: job.workers}
    config = json.loads(ClusterSpec({of: addresses(of, n) for of, n in counts.items()}, role, 0).as_tf_config())
    config["task"]["index"] = "__INDEX__"
    return json.dumps(config).replace('"__INDEX__"', "__INDEX__")
