"""The run's side of training on a cluster: it starts the coordinating process, watches it, and evaluates what it sends."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from k4p1 import errors
from k4p1.cluster.coordinator import Order
from k4p1.cluster.coordinator_process import CoordinatorProcess
from k4p1.cluster.link import Link
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.step_counts import StepCounts
from k4p1.engine.bookkeeping import Bookkeeping, Evaluation, Progress, TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import FIXED, ParameterGroup
from k4p1.engine.reporting import Reporter
from k4p1.engine.stop_signal import StopSignal

_LOOK_SECONDS = 0.1
_STOP_SECONDS = 22.0
_MOST_RESTARTS = 20
_LONGEST_PAUSE_SECONDS = 30.0
_MARGIN_SECONDS = 60.0
_TRACING_SECONDS = 600.0


class Supervisor:
    """Trains the tasks of a run by way of a coordinating process.

    That process may hang or die at any moment: it is then ended, and another one returns to the newest checkpoint. A stop
    signal always ends the training, within half a minute.

    Args:
      process: that coordinates.
      policy: how workers are used.
      tasks, groups, reporter, checkpoints: as for `k4p1.engine.training.Trainer`.
      order: what the process is told.
      waits: told for whom the coordinating process waits.
    """

    def __init__(
        self,
        process: CoordinatorProcess,
        policy: WorkerPolicy,
        tasks: Sequence[TrainingTask],
        groups: Sequence[ParameterGroup],
        reporter: Reporter,
        checkpoints: Checkpoints | None,
        order: Order,
        waits: Callable[[str], None] = lambda whom: None,
    ):
        self._waits = waits
        self._process, self._policy, self._reporter, self._order = process, policy, reporter, order
        self._state = _HostState(groups)
        self._books = Bookkeeping(tasks, self._state, reporter, checkpoints)
        self._done = dict(order.known_steps)
        self._saved = self._books.saved
        self._progressed = False
        self._evaluation = _Evaluation(self._books)
        self.step_counts: StepCounts | None = None

    @property
    def progress(self) -> Progress:
        """Best metric and skipped images so far."""
        return self._books.progress

    @property
    def evaluation(self) -> Evaluation:
        """What evaluates the tasks."""
        return self._books.evaluation

    def run(self) -> dict[str, np.ndarray]:
        """Trains to the step targets and returns the vectors of the joint best state, by group name.

        Raises:
          DivergedError, DataError, ClusterError, Preempted, Interrupted: see `ClusterTrainer`.
        """
        restarts, order = 0, self._order
        try:
            with StopSignal() as stop:
                while True:
                    self._progressed = False
                    try:
                        self._supervise(order, stop)
                        return self._books.best_vectors()
                    except errors.ServerLostError as e:
                        lost = e
                    if stop.caught:
                        raise stop.error(self._saved) from lost
                    restarts = 1 if self._progressed else restarts + 1
                    if self._books.saved is None or restarts > _MOST_RESTARTS:
                        raise errors.ClusterError(f"{lost}; given up after {restarts - 1} restarts in a row") from lost
                    self._reporter.message(f"{str(lost).splitlines()[0]}; returning to the newest checkpoint")
                    self._pause(min(_LONGEST_PAUSE_SECONDS, 0.5 * 2**restarts), stop)
                    order = Order(order.run_hash, dict(self._done), order.refit_step, again=True)
        finally:
            self._process.end()

    def _pause(self, seconds: float, stop: StopSignal) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stop.caught:
            time.sleep(_LOOK_SECONDS)
        self._evaluation.wait(stop)  # it writes into the folder that the next process resumes from
        if stop.caught:
            raise stop.error(self._saved)

    def _supervise(self, order: Order, stop: StopSignal) -> None:
        """One coordinating process, until it is done."""
        link = self._process.start()
        link.send("begin", order)
        heard, told = time.monotonic(), None
        doing, stuck = "starting", 0.0
        try:
            while True:
                try:
                    message = link.receive(_LOOK_SECONDS)
                except EOFError:
                    code = self._process.end()
                    raise errors.ServerLostError(f"the coordinating process ended while {doing} (exit {code})") from None
                now = time.monotonic()
                if stop.caught and told is None:
                    told = now
                    link.send("stop", stop.caught)
                if told is not None and now - told > _STOP_SECONDS:
                    raise stop.error(self._saved)
                if message is None:
                    if now - heard > self._policy.silence_timeout_s:
                        raise errors.ServerLostError(
                            f"the coordinating process has been silent for {now - heard:.0f} s while {doing}: some server "
                            "or worker does not answer"
                        )
                    continue
                heard = now
                name, values = message
                if name == "pulse":
                    doing, stuck = values
                    if stuck > self._patience(doing):
                        raise errors.ServerLostError(f"the coordinating process has been {doing} for {stuck:.0f} s")
                elif name == "trained":
                    vectors, self.step_counts, self.progress.skipped = values
                    self._evaluation.wait(stop)
                    if stop.caught:
                        raise stop.error(self._saved)
                    self._state.last = vectors
                    return
                else:
                    self._handle(name, values, link)
                self._evaluation.check()
        finally:
            self._process.end()
            link.close()

    def _patience(self, doing: str) -> float:
        if doing == "connecting":
            return self._policy.startup_timeout_s + _MARGIN_SECONDS
        return self._policy.silence_timeout_s + _MARGIN_SECONDS if doing == "training" else _TRACING_SECONDS

    def _handle(self, name: str, values: tuple, link: Link) -> None:
        if name == "steps":
            done, reports = values
            self._reporter.steps(done, reports)
        elif name == "progress":
            (done,) = values
            self._progressed |= any(count > self._done.get(task, 0) for task, count in done.items())
            self._done = done
            self._reporter.progress(done)
        elif name == "begins":
            self._reporter.resumed(*values)
        elif name == "message":
            self._reporter.message(*values)
        elif name == "status":
            state, parts = values
            self._reporter.status.update(state, **parts)
        elif name == "resumed":
            (progress,) = values
            self._books.progress = Progress.from_json(progress)
        elif name == "waits":
            self._waits(*values)
        elif name == "saved_steps":
            self._reporter.saved(*values)
        elif name == "saved":
            (self._saved,) = values
        elif name == "evaluate":
            (snapshot,) = values
            self._evaluation.put(snapshot, link)
        elif name == "failed":
            kind, text = values
            raise kind(text)


class _HostState:
    """Stands for a store: the vectors that no snapshot holds are those that the run was built with."""

    def __init__(self, groups: Sequence[ParameterGroup]):
        self._groups = groups
        self.last: dict[str, np.ndarray] = {}

    def vectors(self, snapshot: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """By group name."""
        fixed = {group.name: group.initial() for group in self._groups if group.role == FIXED}
        if snapshot is None:
            return {**fixed, **self.last}
        found = {key.removeprefix("vector/"): value for key, value in snapshot.items() if key.startswith("vector/")}
        return {**fixed, **found}


class _Evaluation:
    """Evaluates snapshots one after another in a thread of its own; of those that wait only the newest is kept."""

    def __init__(self, books: Bookkeeping):
        self._books = books
        self._changed = threading.Condition()
        self._next: tuple[Mapping[str, np.ndarray], Link] | None = None
        self._busy = False
        self._error: BaseException | None = None

    def put(self, snapshot: Mapping[str, np.ndarray], link: Link) -> None:
        """Begins, or lets it wait for the evaluation before it."""
        with self._changed:
            self._next = snapshot, link
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._run, name="evaluation", daemon=True).start()

    def check(self) -> None:
        """Raises what an evaluation raised."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, stop: StopSignal) -> None:
        """Until nothing is left to evaluate, or a stop is asked for."""
        with self._changed:
            while self._busy and not stop.caught:
                self._changed.wait(_LOOK_SECONDS)
        self.check()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._next is None or self._error is not None:
                    self._busy, self._next = False, None
                    self._changed.notify_all()
                    return
                (snapshot, link), self._next = self._next, None
            try:
                self._books.evaluate(snapshot)
                link.send("best", self._books.progress.best, self._books.progress.best_step)
            except BaseException as e:  # it belongs to the run
                self._error = e
