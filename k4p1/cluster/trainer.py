"""The training loop of a cluster: workers ask for steps, the coordinator watches, saves and reports."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.cluster.connection import Connection
from k4p1.cluster.failures import explained
from k4p1.cluster.heartbeat import ServerHeartbeat
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.several_steps import several_steps
from k4p1.cluster.step_counts import StepCounts
from k4p1.cluster.step_dispatcher import StepDispatcher
from k4p1.cluster.store import ServerStore
from k4p1.cluster.tensorflow_private import Step
from k4p1.cluster.worker_groups import WorkerGroups, WorkerRequest
from k4p1.cluster.worker_reports import WorkerReports
from k4p1.engine.bookkeeping import Bookkeeping, Progress, TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.data_errors import data_errors
from k4p1.engine.reporting import Reporter
from k4p1.engine.step import Pace, training_step
from k4p1.engine.stop_signal import StopSignal

_LOOK_SECONDS = 0.05
_CHECK_SECONDS = 0.2
_COUNT_SECONDS = 0.5
_REPORT_SECONDS = 10.0
_PAUSE_SECONDS = 10.0
DISPATCH_SECONDS = 0.5


class ClusterTrainer:
    """Trains the tasks of a run on the workers of a cluster, from where its newest checkpoint stands.

    Args:
      connection: to servers and workers.
      tasks: with distinct names.
      store: on the servers of the connection.
      requests: how many workers each task needs.
      policy: how workers are used.
      reporter: reports what happens.
      checkpoints: where states are saved; None for nowhere.
      paced: whether tasks must end together: they train something that they share.
      known_steps: how far an earlier coordinator had come, by task; later steps are reported lost.
      tell: called with `evaluate` and a snapshot, which somebody else evaluates; `saved` and a step; `resumed` and the
        progress of a checkpoint.
      stop: says when to stop; None catches signals.
      alive: called at every look around and before whatever takes long, with what that is.
      who_is_silent: names the servers that do not answer.
      returned: the workers that were absent at the start and answer now; they join at the next checkpoint.
      seed, evaluate_every, checkpoint_every, loss_scaled: see `k4p1.engine.training.Trainer`.
    """

    def __init__(
        self,
        connection: Connection,
        tasks: Sequence[TrainingTask],
        store: ServerStore,
        requests: Mapping[str, WorkerRequest],
        policy: WorkerPolicy,
        reporter: Reporter,
        checkpoints: Checkpoints | None = None,
        *,
        paced: bool = True,
        known_steps: Mapping[str, int] | None = None,
        tell: Callable[[str, Any], None] = lambda what, value: None,
        stop: StopSignal | None = None,
        alive: Callable[[str], None] = lambda doing: None,
        who_is_silent: Callable[[], str] = str,
        returned: Callable[[], Sequence[int]] = tuple,
        seed: int = 0,
        evaluate_every: int,
        checkpoint_every: int,
        loss_scaled: bool = False,
    ):
        self._connection, self._store, self._reporter = connection, store, reporter
        self._queue = connection.coordinator.queue
        self._books = Bookkeeping(tasks, store, reporter, checkpoints)
        self._targets = self._books.targets
        self._tell, self._stop, self._alive, self._who_is_silent = tell, stop, alive, who_is_silent
        self._evaluate_every, self._checkpoint_every = evaluate_every, checkpoint_every
        self._known_steps, self._returned = dict(known_steps or {}), returned
        self._policy = policy
        self._saved = 0
        self._groups = WorkerGroups(requests, self._targets, connection.workers, policy, paced)
        epochs = tuple(task.epochs for task in tasks)
        self._make, terms = {}, {}
        for index, task in enumerate(tasks):
            pace = Pace(task.steps, epochs, seed, index)
            step = training_step(task.pure, store, task.loss, task.schedule, pace, loss_scaled)
            terms[task.name] = list(task.loss_terms) if len(task.loss_terms) > 1 else []
            how = {"most": policy.steps_per_dispatch, "seconds": DISPATCH_SECONDS}
            function = several_steps(step, store, task.name, terms[task.name], **how)
            self._make[task.name] = (tf.function(function, autograph=False), task.batches)
        self.dispatcher = StepDispatcher(self._queue, connection.present, self._groups, self._targets, WorkerReports(terms))

    @property
    def step_counts(self) -> StepCounts:
        """What became of the steps."""
        return self.dispatcher.step_counts

    @property
    def progress(self) -> Progress:
        """Best metric and skipped images so far."""
        return self._books.progress

    def run(self) -> dict[str, np.ndarray]:
        """Trains to the step targets and returns the last vectors, by group name.

        Raises:
          DivergedError: a loss that is not finite; names task, step and worker.
          DataError: a worker cannot read its data, or has no more; names task and worker.
          ClusterError: a server is lost, or a task has no live worker for too long.
          Preempted, Interrupted: on SIGTERM or SIGINT, after a checkpoint.
        """
        try:
            self._trace()
            self._alive("reading the newest checkpoint")
            self._resume()
            heartbeat = ServerHeartbeat(self._store, self._policy.silence_timeout_s, self._who_is_silent)
            with heartbeat, self._stop or StopSignal() as stop:
                self.dispatcher.begin(range(self._connection.workers))
                self._queue.dispatcher = self.dispatcher
                self._go_on(heartbeat)
                try:
                    snapshot = self._watch(heartbeat, stop)
                except (tf.errors.OpError, errors.ServerLostError) as e:
                    if stop.caught:  # who asks for an end must not get a restart
                        raise stop.error(self._books.saved) from e
                    raise
            return self._store.vectors(snapshot)
        except tf.errors.OpError as e:
            raise explained(e) from e
        finally:
            self._queue.pause(timeout=0.0)
            self._queue.dispatcher = None

    def _resume(self) -> None:
        resumed = self._books.resume() or {}
        if resumed:
            self._tell("resumed", self._books.progress.as_json())
            self._tell("saved", self._books.saved)
        lost = {task: self._known_steps.get(task, 0) - resumed.get(task, 0) for task in self._targets}
        if sum(max(steps, 0) for steps in lost.values()):
            told = ", ".join(f"{task} {max(steps, 0)}" for task, steps in lost.items())
            self._reporter.message(f"steps since that checkpoint are lost and taken again: {told}")
        self.dispatcher.done = self._store.done()

    def _trace(self) -> None:
        """Makes the input pipelines on the workers, and all functions: later, one would wait for every worker."""
        for task, (function, batches) in self._make.items():
            self._alive(f"tracing the steps of task '{task}'")
            with data_errors(task):
                data = self._connection.coordinator.create_per_worker_dataset(self._pipeline_of(task, batches))
                iterator = iter(data)
                self.dispatcher.traced[task] = (Step(task, function, iterator, self._queue).traced, iterator)
        self._store.prepare()
        for worker in self._groups.idle():
            self._reporter.message(f"worker {worker} has no task")

    def _pipeline_of(self, task: str, batches: Any) -> Any:
        present = self._connection.present

        def pipeline() -> tf.data.Dataset:
            """Starts at the ticket of the moment: a restarted worker does not see its first batches again."""
            worker = tf.distribute.coordinator.experimental_get_current_worker_index()
            if present != list(range(len(present))):
                worker = tf.gather(tf.constant(present, tf.int64), worker)
            return batches(self._store.ticket(task), worker)

        return pipeline

    def _watch(self, heartbeat: ServerHeartbeat, stop: StopSignal) -> dict[str, np.ndarray]:
        total = evaluated = self._saved = sum(self.dispatcher.done.values())
        last_report = last_count = last_check = time.monotonic()
        while True:
            time.sleep(_LOOK_SECONDS)
            self._alive("training")
            self._queue.wake()
            heartbeat.check()
            self._check_failures()
            if (now := time.monotonic()) - last_check > _CHECK_SECONDS:
                last_check = now
                self._check_workers(heartbeat)
            done, idle = self.dispatcher.moment()
            over = done == self._targets and idle and heartbeat.done == self._targets
            before, total = total, sum(done.values())
            if total > before:
                self._connection.coordinator.forget_failures()
            if now - last_report > _REPORT_SECONDS or over or stop.caught:
                last_report = last_count = now
                self._report(done)
            elif now - last_count > _COUNT_SECONDS:
                last_count = now
                self._count(done)
            evaluate = over or total // self._evaluate_every > evaluated // self._evaluate_every
            save = over or stop.caught or total // self._checkpoint_every > self._saved // self._checkpoint_every
            if evaluate or save:
                snapshot = self._snapshot(heartbeat)
                if save:
                    self._save(snapshot)
                    if back := not (over or stop.caught) and self._returned():
                        names = ", ".join(map(str, back))
                        raise errors.ServerLostError(f"worker {names} answers again; the coordinator connects anew")
                if evaluate:
                    self._tell("evaluate", snapshot)
                    evaluated = total
            if over:
                return snapshot
            if stop.caught:
                raise stop.error(self._books.saved)
            self._allow(heartbeat)

    def _allow(self, heartbeat: ServerHeartbeat) -> None:
        """Tells workers how far they may go now."""
        if (allowed := self.dispatcher.allow()) is not None:
            heartbeat.wait_for(functools.partial(self._store.allow, allowed))
            self._queue.wake()

    def _report(self, done: Mapping[str, int]) -> None:
        arrived = self.dispatcher.take_reports()
        self._count(done)
        self._books.report(arrived, done)

    def _count(self, done: Mapping[str, int]) -> None:
        """What is cheap to say often: how far tasks and workers are, and news."""
        news, unfinite = self.dispatcher.take_news()
        for text in news:
            self._reporter.message(text)
        if unfinite is not None:
            self._books.report([unfinite], done)
        self._reporter.progress(done)
        self._reporter.status.update(**self.dispatcher.described(range(self._connection.workers)))

    def _check_failures(self) -> None:
        failure = self.dispatcher.failure
        if isinstance(failure, errors.K4p1Error):
            raise failure
        if failure is not None:
            raise explained(failure) from failure

    def _check_workers(self, heartbeat: ServerHeartbeat) -> None:
        alarms, overdue, moved = self.dispatcher.look_around(dict(heartbeat.done))
        for task in alarms:
            self._reporter.message(
                f"ALARM: task '{task}' has no live worker (its group: {', '.join(map(str, self._groups.group(task)))})"
            )
        for worker, task in moved.items():
            self._reporter.message(f"worker {worker} joins task '{task}'")
        for task in overdue:
            borrowed = self.dispatcher.borrow(task) if self._policy.borrow_workers else None
            if borrowed is None:
                if self._books.saved is not None:
                    self._save(self._snapshot(heartbeat))
                saved = self._books.saved or "nothing was saved (no model_dir)"
                raise errors.ClusterError(
                    f"task '{task}' has had no live worker for {self._policy.no_worker_timeout_s:g} s; {saved}; bring its "
                    "workers back and start again, or set borrow_workers = True"
                )
            self._reporter.message(f"task '{task}' borrows worker {borrowed}")

    def _snapshot(self, heartbeat: ServerHeartbeat) -> dict[str, np.ndarray]:
        """The state of a moment without steps in flight; a dispatch that does not return in time is not waited for."""
        heartbeat.wait_for(functools.partial(self._store.allow, dict.fromkeys(self._targets, 0)))
        try:
            heartbeat.wait_for(functools.partial(self._queue.pause, _PAUSE_SECONDS, self.dispatcher.lost()))
            return heartbeat.wait_for(self._store.snapshot)
        finally:
            self._go_on(heartbeat)

    def _go_on(self, heartbeat: ServerHeartbeat) -> None:
        self.dispatcher.allowed = {}
        self._queue.go_on()
        self._allow(heartbeat)

    def _save(self, snapshot: Mapping[str, np.ndarray]) -> int:
        self._report(self.dispatcher.moment()[0])  # a loss that is not finite is reported before anything is saved
        self.step_counts.settle(snapshot, list(self._store.groups.values()))
        self._reporter.status.update(owners={o: {"missing": count} for o, count in self.step_counts.missing.items()})
        self._saved = self._books.save(snapshot)
        self._tell("saved", self._books.saved)
        return self._saved
