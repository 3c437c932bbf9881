"""A run's cluster, as the process of the run sees it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from k4p1 import errors
from k4p1.cluster.connection import check_port
from k4p1.cluster.coordinator import Order, Training, coordination
from k4p1.cluster.coordinator_process import CoordinatorProcess
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.spec import COORDINATOR, WORKER, ClusterSpec
from k4p1.cluster.supervisor import Supervisor
from k4p1.cluster.worker_groups import WorkerRequest, assign
from k4p1.engine.bookkeeping import TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import ParameterGroup
from k4p1.engine.reporting import Reporter
from k4p1.files import run_record


@dataclasses.dataclass(frozen=True)
class RunCluster:
    """The cluster of a run.

    Attributes:
      process: that coordinates; this one never joins the cluster.
      policy: how workers are used.
      known_steps: how far a coordinator before this one had come, by task.
    """

    process: CoordinatorProcess
    policy: WorkerPolicy
    known_steps: Mapping[str, int]
    waits: Callable[[str], None]

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
    def begin(
        cls,
        spec: ClusterSpec,
        workers: Mapping[str, tuple[int | None, float]],
        policy: WorkerPolicy,
        known_steps: Mapping[str, int],
        model_dir: pathlib.Path | None,
        configuration: run_record.Configuration,
        training: Training,
        waits: Callable[[str], None] = lambda whom: None,
    ) -> "RunCluster":
        """Says which run this is, and makes what the coordinating process is copied from: before TensorFlow starts here.

        Args:
          spec: seen by the coordinator.
          workers: number or share of each task.
          policy: how they are used.
          known_steps: see the class.
          model_dir: where the run is announced; None announces nothing.
          configuration: of its gin files.
          training: what the coordinating process does.
          waits: told for whom the coordinator waits.

        Raises:
          ConfigError: TensorFlow has started already.
        """
        requests = {task: WorkerRequest(*request) for task, request in workers.items()}
        process = CoordinatorProcess(coordination(spec, requests, policy, training))
        if model_dir is not None:
            run_record.announce(model_dir, configuration)
        return cls(process, policy, known_steps, waits)

    def trainer(
        self,
        tasks: Sequence[TrainingTask],
        groups: Sequence[ParameterGroup],
        reporter: Reporter,
        checkpoints: Checkpoints | None,
        run_hash: str,
        refit_step: int | None = None,
    ) -> Supervisor:
        """Trains on the cluster, see `Supervisor` and `Order`."""
        order = Order(run_hash, self.known_steps if refit_step is None else {}, refit_step)
        return Supervisor(self.process, self.policy, tasks, groups, reporter, checkpoints, order, self.waits)
