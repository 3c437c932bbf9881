"""A run's cluster: who works for whom, and the trainer on it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from k4p1 import errors
from k4p1.cluster.connection import Connection, check_port
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.spec import COORDINATOR, WORKER, ClusterSpec
from k4p1.cluster.store import ServerStore
from k4p1.cluster.trainer import ClusterTrainer
from k4p1.cluster.worker_groups import WorkerRequest, assign
from k4p1.engine.bookkeeping import TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import TRAINED, ParameterGroup
from k4p1.engine.reporting import Reporter
from k4p1.files import run_record

_connections: dict[str, Connection] = {}


@dataclasses.dataclass(frozen=True)
class RunCluster:
    """The cluster of a run.

    Attributes:
      connection: to servers and workers.
      requests: how many workers each task needs.
      policy: how workers are used.
      known_steps: how far a coordinator before this one had come, by task.
    """

    connection: Connection
    requests: Mapping[str, WorkerRequest]
    policy: WorkerPolicy
    known_steps: Mapping[str, int]

    @staticmethod
    def check(spec: ClusterSpec, workers: Mapping[str, tuple[int | None, float]], policy: WorkerPolicy) -> None:
        """Checks role and port of this process, and that there are workers for all tasks, before anything is written.

        Raises:
          ConfigError: too few workers, or a wrong role or port.
        """
        if spec.job != COORDINATOR:
            raise errors.ConfigError(f"TF_CONFIG makes this process {spec.name}; start it with 'k4p1 join'")
        check_port(spec)
        assign(
            {task: WorkerRequest(*request) for task, request in workers.items()},
            len(spec.jobs[WORKER]),
            policy.share_workers,
        )

    @classmethod
    def connect(
        cls,
        spec: ClusterSpec,
        workers: Mapping[str, tuple[int | None, float]],
        policy: WorkerPolicy,
        known_steps: Mapping[str, int],
        model_dir: pathlib.Path | None,
        gin_hash: str,
        tell: Callable[[str], None] = lambda whom: None,
    ) -> "RunCluster":
        """Says which run this is, and waits for servers and workers.

        Args:
          spec: seen by the coordinator.
          workers: number or share of each task.
          policy: how they are used.
          known_steps: see the class.
          model_dir: where the run is announced; None announces nothing.
          gin_hash: of the configuration.
          tell: told for whom the coordinator waits.

        Raises:
          ClusterError: no answer from some address.
        """
        requests = {task: WorkerRequest(*request) for task, request in workers.items()}
        if model_dir is not None:
            run_record.announce(model_dir, gin_hash)
        if spec.as_tf_config() not in _connections:
            _connections[spec.as_tf_config()] = Connection(spec, policy.startup_timeout_s, tell)
        return cls(_connections[spec.as_tf_config()], requests, policy, known_steps)

    def trainer(
        self,
        tasks: Sequence[TrainingTask],
        groups: Sequence[ParameterGroup],
        reporter: Reporter,
        checkpoints: Checkpoints | None,
        **how,
    ) -> ClusterTrainer:
        """The trainer of a run; `how` as for `ClusterTrainer`."""
        steps = {task.name: task.steps for task in tasks}
        store = ServerStore(groups, steps, how["loss_scaled"], devices=self.connection.devices)
        return ClusterTrainer(
            self.connection,
            tasks,
            store,
            self.requests,
            self.policy,
            reporter,
            checkpoints,
            paced=any(group.role == TRAINED and len(group.users) > 1 for group in groups),
            **how,
        )
