"""What a cluster run under Kubernetes is: names, counts, resources, where pods may run."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from k4p1 import errors
from k4p1.cluster.spec import COORDINATOR, SERVER, WORKER

ROLE_NAMES = {COORDINATOR: "coordinator", SERVER: "ps", WORKER: "worker"}
CONFIG_PATH = "/etc/k4p1/gin"
"""Where pods find the gin files; also their working directory, from which files include each other."""

_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_CPUS = (r"\d+(\.\d+)?m?", "a number of CPUs, such as 2 or 500m")
_BYTES = (r"\d+(\.\d+)?([KMGTP]i?)?", "bytes, such as 4Gi or 500M")
_NAME = (r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", "up to 42 lower case letters, digits and '-', a letter first")
_LABEL = r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_MOST_CONFIG_BYTES = 1_000_000


def _check(field: str, value: str, pattern: str, expected: str) -> None:
    if not re.fullmatch(pattern, value):
        raise errors.ConfigError(f"{field}={value!r}: expected {expected}")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What every pod requests, and how much it may use.

    Attributes:
      cpu: CPUs requested, such as `"2"` or `"500m"`.
      memory: requested, and the limit, such as `"4Gi"`.
      gpus: of each worker (`nvidia.com/gpu`).
      cpu_limit: empty for none; a limit slows steps down even where CPUs are idle.
      shared_memory: size of `/dev/shm`; it counts as memory.
      scratch: size of `/tmp`.
    """

    cpu: str = "2"
    memory: str = "4Gi"
    gpus: int = 0
    cpu_limit: str = ""
    shared_memory: str = "1Gi"
    scratch: str = "4Gi"

    def __post_init__(self):
        _check("cpu", self.cpu, *_CPUS)
        if self.cpu_limit:
            _check("cpu_limit", self.cpu_limit, *_CPUS)
        for field in ("memory", "shared_memory", "scratch"):
            _check(field, getattr(self, field), *_BYTES)


@dataclasses.dataclass(frozen=True)
class Scheduling:
    """Where pods may run, and with whose images.

    Attributes:
      node_selector: labels that a node must have, `key=value`.
      tolerations: taints that pods tolerate, `key=value:Effect`, `key:Effect` for any value.
      pull_secrets: names of the secrets of the image's registry.
    """

    node_selector: Sequence[str] = ()
    tolerations: Sequence[str] = ()
    pull_secrets: Sequence[str] = ()

    def __post_init__(self):
        for one in self.node_selector:
            _check("node_selector", one, rf"{_LABEL}={_LABEL}", "key=value, such as pool=gpu")
        for one in self.tolerations:
            _check(
                "toleration",
                one,
                rf"{_LABEL}(={_LABEL})?:({'|'.join(_EFFECTS)})",
                f"key=value:Effect or key:Effect, Effect one of {', '.join(_EFFECTS)}",
            )
        for one in self.pull_secrets:
            _check("pull_secret", one, r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "the name of a secret")


@dataclasses.dataclass(frozen=True)
class ClusterJob:
    """A run on a cluster.

    Attributes:
      name: of the run; names all objects.
      image: container image with k4p1 installed.
      command: `train` or `finetune`.
      flags: of all processes, `--gin_file` and `--gin_bindings`.
      model_dir: where the shared volume is mounted.
      claim: PersistentVolumeClaim of that volume, ReadWriteMany.
      servers, workers: how many.
      port: of every pod.
      resources: of every pod.
      scheduling: of every pod.
      config: text of the gin files by path below `CONFIG_PATH`.
      data_claim: PersistentVolumeClaim with data, mounted read-only; empty for none.
      data_path: where; TFDS looks for its data sets there.
      namespace: of all objects; empty for that of whoever applies them.
      user: number of the user and group of all processes; not 0.
      keep_s: seconds after which a finished run's objects are removed.

    Raises:
      ConfigError: a name that Kubernetes does not allow, a path that is not absolute, or user 0.
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
    scheduling: Scheduling = Scheduling()
    config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data_claim: str = ""
    data_path: str = "/data"
    namespace: str = ""
    user: int = 10001
    keep_s: int = 86400

    def __post_init__(self):
        for field in (
            "name",
            "claim",
            *(["data_claim"] if self.data_claim else []),
            *(["namespace"] if self.namespace else []),
        ):
            _check(field, getattr(self, field), *_NAME)
        for field in ("model_dir", "data_path"):
            _check(field, getattr(self, field), r"/[^:]*", "an absolute path in the pods")
        if self.user < 1:
            raise errors.ConfigError(f"user={self.user}: pods must not run as root; give the number of another user")
        size = sum(len(text.encode()) for text in self.config.values())
        if size > _MOST_CONFIG_BYTES:
            raise errors.ConfigError(f"the gin files have {size:,} bytes; a ConfigMap holds {_MOST_CONFIG_BYTES:,}")

    def object_name(self, role: str) -> str:
        """The name of a role's Job, and the beginning of its pods' host names."""
        return f"{self.name}-{ROLE_NAMES[role]}"

    def selector(self, role: str | None = None) -> dict[str, str]:
        """The labels by which pods of the run, or of one role, are found."""
        component = {"app.kubernetes.io/component": ROLE_NAMES[role]} if role else {}
        return {"app.kubernetes.io/name": "k4p1", "app.kubernetes.io/instance": self.name, **component}

    def metadata(self, name: str, role: str | None = None) -> dict:
        """Name, namespace and the labels that Kubernetes recommends."""
        labels = {
            **self.selector(role),
            "app.kubernetes.io/part-of": self.name,
            "app.kubernetes.io/managed-by": "k4p1-manifest",
        }
        return {"name": name, **({"namespace": self.namespace} if self.namespace else {}), "labels": labels}
