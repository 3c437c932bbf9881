"""What the coordinating process does: it connects to the cluster, trains there, and tells the run what happens."""

import contextlib
import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from k4p1 import errors
from k4p1.cluster.connection import Connection, silence_of
from k4p1.cluster.link import Link, LinkedReporter
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.spec import SERVER, WORKER, ClusterSpec
from k4p1.cluster.store import ServerStore
from k4p1.cluster.trainer import ClusterTrainer
from k4p1.cluster.worker_groups import WorkerRequest
from k4p1.engine.bookkeeping import TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import TRAINED, ParameterGroup
from k4p1.engine.stop_signal import StopSignal

_PULSE_SECONDS = 1.0
_LOOK_SECONDS = 10.0
_STALE_PER_WORKER = 20


@dataclasses.dataclass(frozen=True)
class Order:
    """What a coordinating process is to train.

    Attributes:
      run_hash: of the configuration; see `Checkpoints`.
      known_steps: how far a coordinator before this one had come, by task.
      refit_step: total steps of a refit; None: no refit.
      again: whether this process takes the place of one that was lost or ended.
    """

    run_hash: str
    known_steps: Mapping[str, int]
    refit_step: int | None = None
    again: bool = False


class Training(Protocol):
    """Builds and trains the tasks of an order on a `Coordinator`; returns vectors by group name."""

    def __call__(self, order: Order, coordinator: "Coordinator") -> Mapping[str, Any]:
        """Does so."""


class Coordinator:
    """The cluster as the coordinating process sees it.

    Args:
      spec: seen by the coordinator.
      requests: how many workers each task needs.
      policy: how workers are used.
      link: to the run.

    Attributes:
      reporter: that of the run, at the other end of the link.
    """

    def __init__(self, spec: ClusterSpec, requests: Mapping[str, WorkerRequest], policy: WorkerPolicy, link: Link):
        self._spec, self._requests, self._policy, self._link = spec, requests, policy, link
        self._doing, self._since = "starting", time.monotonic()
        self._connection: Connection | None = None
        self._trainer: ClusterTrainer | None = None
        self._stop = _StopOrder()
        self._order: Order | None = None
        self._begin = threading.Event()
        self.reporter = LinkedReporter(link)

    def work(self, training: Training) -> None:
        """Waits for the order, trains, and sends the outcome, an error included."""
        for function in (self._listen, self._pulse):
            threading.Thread(target=function, daemon=True).start()
        try:
            self._begin.wait()
            self.alive("connecting")
            spare_s = self._policy.silence_timeout_s if self._order.again else None
            self._connection = Connection(
                self._spec,
                self._policy.startup_timeout_s,
                spare_s,
                self.reporter.message,
                lambda whom: self._link.send("waits", whom),
            )
            self.alive("building the tasks")
            with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                warnings.simplefilter("ignore", errors.PatchWarning)  # the run says these things
                vectors = training(self._order, self)
            self._link.send("trained", dict(vectors), self._trainer.step_counts, self._trainer.progress.skipped)
        except errors.K4p1Error as e:
            self._link.send("failed", type(e), str(e))
        except BaseException as e:
            self._link.send("failed", errors.ClusterError, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}")

    def alive(self, doing: str) -> None:
        """Says that the main thread is not stuck, and what it begins."""
        self._doing, self._since = doing, time.monotonic()

    def trainer(
        self,
        tasks: Sequence[TrainingTask],
        groups: Sequence[ParameterGroup],
        reporter: LinkedReporter,
        checkpoints: Checkpoints | None,
        **how,
    ) -> ClusterTrainer:
        """The trainer of a run; `how` as for `ClusterTrainer`."""
        self.alive("placing the parameters on the servers")
        steps = {task.name: task.steps for task in tasks}
        connection, policy = self._connection, self._policy
        store = ServerStore(
            groups,
            steps,
            how["loss_scaled"],
            devices=connection.devices,
            transport=policy.transport,
            max_staleness=policy.max_staleness or _STALE_PER_WORKER * connection.workers,
            damp_stale_updates=policy.damp_stale_updates,
        )
        self._trainer = ClusterTrainer(
            connection,
            tasks,
            store,
            self._requests,
            policy,
            reporter,
            checkpoints,
            paced=any(group.role == TRAINED and len(group.users) > 1 for group in groups),
            known_steps=self._order.known_steps,
            tell=self._link.send,
            stop=self._stop,
            alive=self.alive,
            who_is_silent=self._silent_servers,
            returned=_Returned(self._spec, connection.present),
            **how,
        )
        return self._trainer

    def _silent_servers(self) -> str:
        servers = [self._spec.of(SERVER, index) for index in range(len(self._spec.jobs[SERVER]))]
        return ", ".join(f"{one.name} ({one.address})" for one in servers if silence_of(one.address))

    def _listen(self) -> None:
        """Takes messages of the run; ends this process with the run."""
        while True:
            try:
                message = self._link.receive(None)
            except EOFError:
                os._exit(1)
            name, values = message or ("", ())
            if name == "begin":
                (self._order,) = values
                self._begin.set()
            elif name == "stop":
                (self._stop.caught,) = values
            elif name == "best" and self._trainer is not None:
                self._trainer.progress.best, self._trainer.progress.best_step = values

    def _pulse(self) -> None:
        while True:
            self._link.send("pulse", self._doing, time.monotonic() - self._since)
            time.sleep(_PULSE_SECONDS)


class _StopOrder(StopSignal):
    """The wish of the run that its coordinator stops; this process itself ignores signals."""

    def __enter__(self) -> "StopSignal":
        return self


class _Returned:
    """The absent workers that answer again; asked for in a thread of its own."""

    def __init__(self, spec: ClusterSpec, present: Sequence[int]):
        workers = [spec.of(WORKER, index) for index in range(len(spec.jobs[WORKER]))]
        self._absent = [worker for worker in workers if worker.index not in present]
        self._found: list[int] = []
        if self._absent:
            threading.Thread(target=self._ask, daemon=True).start()

    def __call__(self) -> list[int]:
        return self._found

    def _ask(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            self._found = [worker.index for worker in self._absent if not silence_of(worker.address)]


def coordination(
    spec: ClusterSpec, requests: Mapping[str, WorkerRequest], policy: WorkerPolicy, training: Training
) -> Callable[[Link], None]:
    """What a coordinating process does, as a function of its link to the run."""
    return lambda link: Coordinator(spec, requests, policy, link).work(training)
