"""All objects of a run: ConfigMap, Service, NetworkPolicy, and a Job for each role."""

from typing import Any

import yaml

from k4p1.cluster.kubernetes.cluster_job import ClusterJob
from k4p1.cluster.kubernetes.pod import config_keys, config_name, pod
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER

_RETRIES = {COORDINATOR: 20, SERVER: 100, WORKER: 1000}
_CANNOT_RUN = [1, 2]
_DNS_PORT = 53


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, and nothing by reference."""

    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def manifests(job: ClusterJob) -> str:
    """The objects as YAML.

    `kubectl apply -f` starts the run; the Jobs complete with it and are removed after `keep_s` seconds. `kubectl delete -f`
    removes everything but the volumes.
    """
    claims = f"PersistentVolumeClaim '{job.claim}' (ReadWriteMany)" + (f", '{job.data_claim}'" if job.data_claim else "")
    comment = (
        f"# k4p1 run '{job.name}': {job.servers} parameter servers, {job.workers} workers, one coordinator.\n"
        "# TensorFlow's servers have no authentication: the NetworkPolicy lets only pods of this run reach them, and\n"
        "# works where the network plugin of the cluster enforces such policies. Pods reach each other and the cluster's\n"
        "# DNS only: data and weights must be in the image or on a volume.\n"
        f"# Needs: image {job.image}; {claims}, writable for group {job.user}.\n"
    )
    return comment + yaml.dump_all(objects(job), Dumper=_Dumper, sort_keys=False, width=120)


def kustomize_base(job: ClusterJob) -> dict[str, str]:
    """The files of a Kustomize base by name. Overlays may set namespace, images, labels; names are part of addresses."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **({"namespace": job.namespace} if job.namespace else {}),
        "resources": ["manifest.yaml"],
    }
    comment = (
        "# Overlays may set namespace, images and labels; no prefix or suffix: names are part of the pods' addresses.\n"
    )
    return {
        "kustomization.yaml": comment + yaml.safe_dump(kustomization, sort_keys=False),
        "manifest.yaml": manifests(job),
    }


def objects(job: ClusterJob) -> list[dict[str, Any]]:
    """The objects as plain values."""
    return [
        _config_map(job),
        _service(job),
        _network_policy(job),
        _role(job, SERVER, job.servers, "join"),
        _role(job, WORKER, job.workers, "join"),
        _role(job, COORDINATOR, 1, job.command),
    ]


def _config_map(job: ClusterJob) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": job.metadata(config_name(job)),
        "immutable": True,
        "data": {key: job.config[path] for path, key in config_keys(job).items()},
    }


def _service(job: ClusterJob) -> dict[str, Any]:
    """Headless: it only gives the pods names. Pods have them before they are ready, since all wait for each other."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": job.metadata(job.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": job.selector(),
            "ports": [{"name": "grpc", "port": job.port}],
        },
    }


def _network_policy(job: ClusterJob) -> dict[str, Any]:
    own = [{"podSelector": {"matchLabels": job.selector()}}]
    grpc = [{"protocol": "TCP", "port": job.port}]
    system = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]
    dns = [{"protocol": protocol, "port": _DNS_PORT} for protocol in ("UDP", "TCP")]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": job.metadata(job.name),
        "spec": {
            "podSelector": {"matchLabels": job.selector()},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": own, "ports": grpc}],
            "egress": [{"to": own, "ports": grpc}, {"to": system, "ports": dns}],
        },
    }


def _role(job: ClusterJob, role: str, count: int, command: str) -> dict[str, Any]:
    """An indexed Job: its pods have names of their own, come back when they are lost, and end when the run is over.

    A pod that is evicted or preempted counts as no failure. A coordinator that cannot run (exit 1, 2) fails its Job at once;
    servers and workers may come before it has announced another configuration, refuse, and are right the next time.
    """
    name = job.object_name(role)
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    cannot_run = {"containerName": "k4p1", "operator": "In", "values": _CANNOT_RUN}
    final = [{"action": "FailJob", "onExitCodes": cannot_run}] if role == COORDINATOR else []
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": job.metadata(name, role),
        "spec": {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": count,
            "backoffLimit": _RETRIES[role],
            "ttlSecondsAfterFinished": job.keep_s,
            "podFailurePolicy": {"rules": [disrupted, *final]},
            "template": {
                "metadata": {"labels": job.metadata(name, role)["labels"]},
                "spec": pod(job, role, command),
            },
        },
    }
