"""The training loop of a cluster: workers ask for steps, the coordinator watches, evaluates and saves."""

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.cluster.background_task import BackgroundTask
from k4p1.cluster.connection import Connection
from k4p1.cluster.failures import explained
from k4p1.cluster.heartbeat import ServerHeartbeat
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.step_counts import StepCounts
from k4p1.cluster.store import ServerStore
from k4p1.cluster.tensorflow_private import Step
from k4p1.cluster.worker_groups import WorkerGroups, WorkerRequest
from k4p1.engine.bookkeeping import Bookkeeping, Progress, StepReport, TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.data_errors import data_errors
from k4p1.engine.groups import TRAINED
from k4p1.engine.reporting import Reporter
from k4p1.engine.step import Pace, training_step
from k4p1.engine.stop_signal import StopSignal
from k4p1.patches.patched_model import SHARED

_LOOK_SECONDS = 0.1
_REPORT_SECONDS = 0.5
_PAUSE_SECONDS = 10.0
_SILENT_SECONDS = 10.0
_FIRST_STEP_SECONDS = 120.0
_SILENT_STEPS = 20
_EMPTY_STEPS = 100


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
        seed: int = 0,
        evaluate_every: int,
        checkpoint_every: int,
        loss_scaled: bool = False,
    ):
        self._connection, self._store, self._reporter = connection, store, reporter
        self._queue = connection.coordinator.queue
        self._books = Bookkeeping(tasks, store, reporter, checkpoints)
        self._targets = self._books.targets
        self._evaluate_every, self._checkpoint_every = evaluate_every, checkpoint_every
        self._known_steps = dict(known_steps or {})
        self._policy, self._loss_scaled = policy, loss_scaled
        self._saved = 0
        self._groups = WorkerGroups(requests, self._targets, connection.workers, policy, paced)
        self.step_counts = StepCounts({task: Counter() for task in self._targets}, Counter())
        self._lock = threading.RLock()
        self._done = dict.fromkeys(self._targets, 0)
        self._in_flight = Counter()
        self._arrived: deque[StepReport] = deque()
        self._failures: deque[Exception] = deque()
        self._news: deque[str] = deque()
        self._heard: dict[int, float] = {}
        self._worked: set[int] = set()
        self._given_up: set[int] = set()
        self._empty: Counter = Counter()
        self._busy: dict[int, tuple[str, float]] = {}
        self._step_seconds: dict[str, float] = {}
        self._traced: dict[str, tuple[Any, Any]] = {}
        self._made: dict[tuple[str, int], Step] = {}
        epochs = tuple(task.epochs for task in tasks)
        self._make, self._terms = {}, {}
        for index, task in enumerate(tasks):
            pace = Pace(task.steps, epochs, seed, index)
            step = training_step(task.pure, store, task.loss, task.schedule, pace, loss_scaled)
            terms = self._terms[task.name] = list(task.loss_terms) if len(task.loss_terms) > 1 else []
            self._make[task.name] = (tf.function(packed_step(step, terms)), task.batches)

    @property
    def progress(self) -> Progress:
        """Best metric and skipped images so far."""
        return self._books.progress

    def run(self) -> dict[str, np.ndarray]:
        """Trains to the step targets and returns the vectors of the joint best state, by group name.

        Raises:
          DivergedError: a loss that is not finite; names task, step and worker.
          DataError: a worker cannot read its data; names task and worker.
          ClusterError: a server is lost, or a task has no live worker for too long.
          Preempted, Interrupted: on SIGTERM or SIGINT, after a checkpoint.
        """
        try:
            self._resume()
            self._trace()
            with (
                ServerHeartbeat(self._store) as heartbeat,
                StopSignal() as stop,
                BackgroundTask(self._books.evaluate) as evaluation,
            ):
                self._heard = dict.fromkeys(range(self._connection.workers), time.monotonic())
                self._queue.dispatcher = self
                self._queue.go_on()
                try:
                    self._watch(heartbeat, stop, evaluation)
                except (tf.errors.OpError, errors.ServerLostError) as e:
                    if stop.caught:  # who asks for an end must not get a restart
                        raise stop.error(self._books.saved) from e
                    raise
            return self._books.best_vectors()
        except tf.errors.OpError as e:
            raise explained(e) from e
        finally:
            self._queue.pause(timeout=0.0)
            self._queue.dispatcher = None

    # What workers' threads call.

    def next_step(self, worker: int) -> Step | None:
        """See `tensorflow_private.Dispatcher`."""
        with self._lock:
            self._is_back(worker)
            issued = {task: self._done[task] + self._in_flight[task] for task in self._targets}
            task = self._groups.next_task(worker, issued, self._done)
            if task is None or self._failures:
                return None
            self._in_flight[task] += 1
            self._busy[worker] = (task, time.monotonic())
            if (task, worker) not in self._made:
                self._made[task, worker] = Step(task, *self._traced[task], self._queue)
            return self._made[task, worker]

    def finished(self, step: Step, worker: int, result: np.ndarray | None) -> None:
        """See `tensorflow_private.Dispatcher`."""
        with self._lock:
            self._is_back(worker)
            self._has_ended(step.task, worker)
            _, started = self._busy.pop(worker, (step.task, time.monotonic()))
            if result is None:
                self._empty[step.task] += 1
                return
            self._empty[step.task] = 0
            self._step_seconds[step.task] = time.monotonic() - started
            self._worked.add(worker)
            loss, examples, skipped, ticket, staleness, *terms = map(float, result)
            self._done[step.task] = max(self._done[step.task], int(ticket) + 1)
            self.step_counts.steps[step.task][worker] += 1
            terms = dict(zip(self._terms[step.task], terms, strict=True))
            self._arrived.append(StepReport(step.task, int(ticket), loss, examples, skipped, staleness, worker, terms))

    def interrupted(self, step: Step) -> None:
        """See `tensorflow_private.Dispatcher`."""
        with self._lock:
            self._has_ended(step.task, step.worker)
            self._busy.pop(step.worker, None)
            self.step_counts.interrupted[step.task] += 1
            self._is_lost(step.worker, time.monotonic())

    def failed(self, error: Exception) -> None:
        """See `tensorflow_private.Dispatcher`."""
        with self._lock:
            self._failures.append(error)

    def _has_ended(self, task: str, worker: int) -> None:
        """A step is no longer in flight, unless it was given up already."""
        if worker in self._given_up:
            self._given_up.discard(worker)
        else:
            self._in_flight[task] -= 1

    def _is_back(self, worker: int) -> None:
        self._heard[worker] = time.monotonic()
        if self._groups.is_down(worker):
            self._groups.back(worker)
            self._news.append(f"worker {worker} is back")

    def _is_lost(self, worker: int, since: float) -> None:
        if self._groups.is_down(worker):
            return
        self._groups.lost(worker, since)
        self._worked.discard(worker)
        tasks = self._groups.tasks_of(worker)
        left = sorted({w for task in tasks for w in self._groups.group(task) if not self._groups.is_down(w)})
        go_on = f"its group continues with {', '.join(map(str, left))}" if left else "its group has no other"
        self._news.append(f"worker {worker} of {', '.join(tasks) or 'no task'} is lost; {go_on}")

    # What the coordinator does.

    def _resume(self) -> None:
        resumed = self._books.resume() or {}
        lost = {task: self._known_steps.get(task, 0) - resumed.get(task, 0) for task in self._targets}
        if sum(max(steps, 0) for steps in lost.values()):
            told = ", ".join(f"{task} {max(steps, 0)}" for task, steps in lost.items())
            self._reporter.message(f"steps since that checkpoint are lost and taken again: {told}")
        self._done = self._store.done()

    def _trace(self) -> None:
        """Makes the input pipelines on the workers, and one graph per task."""
        for task, (function, batches) in self._make.items():
            with data_errors(task):
                data = self._connection.coordinator.create_per_worker_dataset(self._pipeline_of(task, batches))
                iterator = iter(data)
                self._traced[task] = (Step(task, function, iterator, self._queue).traced, iterator)
        for worker in self._groups.idle():
            self._reporter.message(f"worker {worker} has no task")

    def _pipeline_of(self, task: str, batches: Any) -> Any:
        def pipeline() -> tf.data.Dataset:
            """Starts at the ticket of the moment: a restarted worker does not see its first batches again."""
            worker = tf.distribute.coordinator.experimental_get_current_worker_index()
            return batches(self._store.ticket(task), worker)

        return pipeline

    def _watch(self, heartbeat: ServerHeartbeat, stop: StopSignal, evaluation: BackgroundTask) -> None:
        start = sum(self._done.values())
        evaluated = self._saved = start
        last_report = time.monotonic()
        while True:
            time.sleep(_LOOK_SECONDS)
            self._queue.wake()
            heartbeat.check()
            self._check_failures()
            self._check_workers(heartbeat)
            with self._lock:
                done, arrived = dict(self._done), list(self._arrived)
                over = done == self._targets and not +self._in_flight and heartbeat.done == self._targets
                late = over or stop.caught or time.monotonic() - last_report > _REPORT_SECONDS
                if late:
                    self._arrived.clear()
            if late:
                last_report = time.monotonic()
                self._report(arrived, done)
            total = sum(done.values())
            evaluation.check()
            if over or total // self._evaluate_every > evaluated // self._evaluate_every:
                if over:
                    evaluation.wait()
                if evaluation.start():
                    evaluated = total
            if over:
                evaluation.wait()
            if over or stop.caught or total // self._checkpoint_every > self._saved // self._checkpoint_every:
                self._save()
            if over:
                return
            if stop.caught:
                raise stop.error(self._books.saved)

    def _report(self, arrived: Sequence[StepReport], done: Mapping[str, int]) -> None:
        while self._news:
            self._reporter.message(self._news.popleft())
        self._books.report(arrived, done)
        with self._lock:
            workers = {
                worker: {
                    "state": "lost" if self._groups.is_down(worker) else "working" if worker in self._busy else "waiting",
                    "tasks": self._groups.tasks_of(worker),
                    "steps": sum(counts[worker] for counts in self.step_counts.steps.values()),
                    "steps_of": {task: counts[worker] for task, counts in self.step_counts.steps.items() if counts[worker]},
                }
                for worker in self._heard
            }
            tasks = {
                task: {"workers": self._groups.group(task), "interrupted": self.step_counts.interrupted[task]}
                for task in self._targets
            }
        self._reporter.status.update(workers=workers, tasks=tasks)

    def _check_failures(self) -> None:
        with self._lock:
            failure = self._failures[0] if self._failures else None
        if failure is not None:
            raise explained(failure) from failure

    def _check_workers(self, heartbeat: ServerHeartbeat) -> None:
        for task, count in list(self._empty.items()):
            if count >= _EMPTY_STEPS and self._store.done()[task] < self._targets[task]:
                raise errors.DataError(f"task '{task}': its input pipeline ended before its steps were done")
        now = time.monotonic()
        with self._lock:
            for task, count in heartbeat.done.items():
                self._done[task] = max(self._done[task], count)
            for worker, heard in self._heard.items():
                task, _ = self._busy.get(worker, (None, 0.0))
                usual = self._step_seconds.get(task) if task else 0.0
                first = usual is None or worker not in self._worked
                patience = _FIRST_STEP_SECONDS if first else max(_SILENT_SECONDS, _SILENT_STEPS * usual)
                if now - heard > patience and not self._groups.is_down(worker):
                    self._is_lost(worker, heard)
                    if task is not None:  # another worker takes the step
                        self._in_flight[task] -= 1
                        self._given_up.add(worker)
            alarms, overdue = self._groups.alarms(now, self._done), self._groups.overdue(now, self._done)
            moved = self._groups.reassign(self._done)
        for task in alarms:
            self._reporter.message(
                f"ALARM: task '{task}' has no live worker (its group: {', '.join(map(str, self._groups.group(task)))})"
            )
        for worker, task in moved.items():
            self._reporter.message(f"worker {worker} joins task '{task}'")
        for task in overdue:
            with self._lock:
                borrowed = self._groups.borrow(task) if self._policy.borrow_workers else None
            if borrowed is None:
                self._save()
                saved = self._books.saved or "nothing was saved (no model_dir)"
                raise errors.ClusterError(
                    f"task '{task}' has had no live worker for {self._policy.no_worker_timeout_s:g} s; {saved}; bring its "
                    "workers back and start again, or set borrow_workers = True"
                )
            self._reporter.message(f"task '{task}' borrows worker {borrowed}")

    def _save(self) -> int:
        """A checkpoint of a moment without steps in flight; one that does not return in time is not waited for."""
        self._queue.pause(_PAUSE_SECONDS)
        try:
            snapshot = self._store.snapshot()
        finally:
            self._queue.go_on()
        with self._lock:
            done, arrived = dict(self._done), list(self._arrived)
            self._arrived.clear()
        self._report(arrived, done)  # a loss that is not finite is reported before anything is saved
        self.step_counts.missing = self._missing(snapshot)
        self._reporter.status.update(owners={owner: {"missing": count} for owner, count in self.step_counts.missing.items()})
        self._saved = self._books.save(snapshot)
        return self._saved

    def _missing(self, snapshot: Mapping[str, np.ndarray]) -> dict[str, int]:
        missing: dict[str, int] = {}
        if self._loss_scaled:  # gradients that overflow are dropped on purpose
            return missing
        for group in self._store.groups.values():
            if group.role == TRAINED:
                tickets = sum(int(snapshot[f"ticket/{task}"]) for task in group.users)
                owner = SHARED if len(group.users) > 1 else group.owner
                missing[owner] = max(missing.get(owner, 0), tickets - int(snapshot[f"updates/{group.name}"]))
        return missing


def packed_step(step: Any, terms: Sequence[str] = ()) -> Any:
    """A step as a function of an iterator that returns all results as one tensor: one message instead of several.

    Args:
      step: a training step.
      terms: of the loss, whose values come last; those of a loss of one term say nothing new.
    """

    def function(iterator: Any) -> tf.Tensor:
        *values, by_name = step(next(iterator))
        return tf.stack([tf.cast(value, tf.float64) for value in (*values, *(by_name[name] for name in terms))])

    return function
