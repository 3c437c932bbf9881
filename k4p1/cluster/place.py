"""Where a run happens: in this process, on a local cluster that is yet to be started, or in a role of a cluster."""

import dataclasses
import os

from k4p1 import errors
from k4p1.cluster import spec
from k4p1.cluster.spec import SERVER, WORKER, ClusterSpec


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run happens; neither `launch` nor `role`: in this process alone.

    Attributes:
      launch: (servers, workers) to start as processes of this machine.
      role: of this process in a cluster.
    """

    launch: tuple[int, int] | None = None
    role: ClusterSpec | None = None


def where_to_run(*, local_cluster: str | None = None, slurm: str | None = None, slurm_port: int = 8888) -> Place:
    """Decides by flags and environment; `TF_CONFIG` makes this process a part of a cluster.

    Args:
      local_cluster: counts such as `ps:1,workers:2`; None for no local cluster.
      slurm: count of servers such as `ps:2`, within a Slurm job step; `TF_CONFIG` is set accordingly.
      slurm_port: first port on each node, under Slurm.

    Raises:
      ConfigError: choices that exclude each other, or a malformed one.
    """
    if local_cluster is not None and slurm is not None:
        raise errors.ConfigError("--local_cluster and --slurm exclude each other")
    if local_cluster is not None:
        counts = spec.parse_counts(local_cluster, "--local_cluster", (SERVER, WORKER))
        if os.environ.get("TF_CONFIG"):
            raise errors.ConfigError(
                "TF_CONFIG is set: this process is part of another cluster; unset it, or leave out --local_cluster"
            )
        return Place(launch=(counts[SERVER], counts[WORKER]))
    if slurm is not None:
        role = spec.from_slurm(spec.parse_counts(slurm, "--slurm", (SERVER,))[SERVER], slurm_port)
        os.environ["TF_CONFIG"] = role.as_tf_config()
        return Place(role=role)
    return Place(role=spec.from_environment())
