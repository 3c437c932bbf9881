"""Kubernetes manifests of a cluster run: plain objects, as one YAML text or a Kustomize base."""

from k4p1.cluster.kubernetes.cluster_job import ClusterJob
from k4p1.cluster.kubernetes.cluster_job import Resources
from k4p1.cluster.kubernetes.cluster_job import Scheduling
from k4p1.cluster.kubernetes.manifest import kustomize_base
from k4p1.cluster.kubernetes.manifest import manifests
from k4p1.cluster.kubernetes.manifest import objects

__all__ = ["ClusterJob", "Resources", "Scheduling", "kustomize_base", "manifests", "objects"]
