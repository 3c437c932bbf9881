"""The training loop of a cluster: workers ask for steps, the coordinator watches, saves and reports."""

import functools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.cluster.connection import Connection
from k4p1.cluster.failures import explained
from k4p1.cluster.heartbeat import ServerHeartbeat
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.several_steps import Results, several_steps
from k4p1.cluster.step_counts import StepCounts
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
_COUNT_SECONDS = 0.5
_REPORT_SECONDS = 10.0
_PAUSE_SECONDS = 10.0
_SILENT_SECONDS = 10.0
_FIRST_STEP_SECONDS = 120.0
_SILENT_DISPATCHES = 20
_MOST_EMPTY = 3
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
        self.step_counts = StepCounts({task: Counter() for task in self._targets}, Counter())
        self.step_counts.out_of_data = {task: Counter() for task in self._targets}
        self._lock = threading.RLock()
        self._done = dict.fromkeys(self._targets, 0)
        self._allowed: dict[str, int] = {}
        self._in_flight = Counter()
        self._failures: deque[Exception] = deque()
        self._news: deque[str] = deque()
        self._heard: dict[int, float] = {}
        self._worked: set[int] = set()
        self._given_up: set[int] = set()
        self._busy: dict[int, tuple[str, float]] = {}
        self._usual: dict[str, float] = {}
        self._traced: dict[str, tuple[Any, Any]] = {}
        self._made: dict[tuple[str, int], Step] = {}
        epochs = tuple(task.epochs for task in tasks)
        self._make, terms = {}, {}
        for index, task in enumerate(tasks):
            pace = Pace(task.steps, epochs, seed, index)
            step = training_step(task.pure, store, task.loss, task.schedule, pace, loss_scaled)
            terms[task.name] = list(task.loss_terms) if len(task.loss_terms) > 1 else []
            how = {"most": policy.steps_per_dispatch, "seconds": DISPATCH_SECONDS}
            function = several_steps(step, store, task.name, terms[task.name], **how)
            self._make[task.name] = (tf.function(function, autograph=False), task.batches)
        self._arrived = WorkerReports(terms)

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
                now = time.monotonic()
                self._heard = dict.fromkeys(self._connection.present, now)
                for worker in set(range(self._connection.workers)) - set(self._heard):
                    self._is_lost(worker, now)
                self._queue.dispatcher = self
                self._go_on(heartbeat)
                try:
                    snapshot = self._watch(heartbeat, stop)
                except (tf.errors.OpError, errors.ServerLostError) as e:
                    if stop.caught:  # who asks for an end must not get a restart
                        raise stop.error(self._saved if self._books.saves else None) from e
                    raise
            return self._store.vectors(snapshot)
        except tf.errors.OpError as e:
            raise explained(e) from e
        finally:
            self._queue.pause(timeout=0.0)
            self._queue.dispatcher = None

    # What workers' threads call; they count workers as TensorFlow does.

    def next_step(self, worker: int) -> Step | None:
        """See `tensorflow_private.Dispatcher`."""
        worker = self._connection.present[worker]
        with self._lock:
            self._is_back(worker)
            issued = {task: self._done[task] + self._in_flight[task] for task in self._targets}
            task = self._groups.next_task(worker, issued, self._done)
            if task is None or self._failures or self._done[task] >= self._allowed.get(task, 0):
                return None
            self._in_flight[task] += 1
            self._busy[worker] = (task, time.monotonic())
            if (task, worker) not in self._made:
                self._made[task, worker] = Step(task, *self._traced[task], self._queue)
            return self._made[task, worker]

    def finished(self, step: Step, worker: int, result: np.ndarray | None) -> None:
        """See `tensorflow_private.Dispatcher`."""
        worker = self._connection.present[worker]
        with self._lock:
            self._is_back(worker)
            self._has_ended(step.task, worker)
            _, started = self._busy.pop(worker, (step.task, time.monotonic()))
            if result is None:
                return
            results, empty = Results.of(result), self.step_counts.out_of_data[step.task]
            if results.out_of_data:
                empty[worker] += 1
                if empty[worker] >= _MOST_EMPTY:
                    place = f"task '{step.task}' on worker {worker}"
                    self._failures.append(errors.DataError(f"{place}: its input pipeline ended before its steps were done"))
            if not len(results.rows):
                return
            self._usual[step.task] = time.monotonic() - started
            self._worked.add(worker)
            self._done[step.task] = max(self._done[step.task], int(results.rows[-1, 3]) + 1)
            self.step_counts.steps[step.task][worker] += len(results.rows)
            self._arrived.add(step.task, worker, results.rows)

    def interrupted(self, step: Step) -> None:
        """See `tensorflow_private.Dispatcher`."""
        worker = self._connection.present[step.worker]
        with self._lock:
            self._has_ended(step.task, worker)
            self._busy.pop(worker, None)
            self.step_counts.interrupted[step.task] += 1
            self._is_lost(worker, time.monotonic())

    def failed(self, error: Exception) -> None:
        """See `tensorflow_private.Dispatcher`."""
        with self._lock:
            if hasattr(error, "k4p1_worker"):
                error.k4p1_worker = self._connection.present[error.k4p1_worker]
            self._failures.append(error)

    def _has_ended(self, task: str, worker: int) -> None:
        """A dispatch is no longer in flight, unless it was given up already."""
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
        if resumed:
            self._tell("resumed", self._books.progress.as_json())
        lost = {task: self._known_steps.get(task, 0) - resumed.get(task, 0) for task in self._targets}
        if sum(max(steps, 0) for steps in lost.values()):
            told = ", ".join(f"{task} {max(steps, 0)}" for task, steps in lost.items())
            self._reporter.message(f"steps since that checkpoint are lost and taken again: {told}")
        self._done = self._store.done()

    def _trace(self) -> None:
        """Makes the input pipelines on the workers, and all functions: later, one would wait for every worker."""
        for task, (function, batches) in self._make.items():
            self._alive(f"tracing the steps of task '{task}'")
            with data_errors(task):
                data = self._connection.coordinator.create_per_worker_dataset(self._pipeline_of(task, batches))
                iterator = iter(data)
                self._traced[task] = (Step(task, function, iterator, self._queue).traced, iterator)
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
        total = evaluated = self._saved = sum(self._done.values())
        last_report = last_count = time.monotonic()
        while True:
            time.sleep(_LOOK_SECONDS)
            self._alive("training")
            self._queue.wake()
            heartbeat.check()
            self._check_failures()
            self._check_workers(heartbeat)
            with self._lock:
                done = dict(self._done)
                over = done == self._targets and not +self._in_flight and heartbeat.done == self._targets
            now, before, total = time.monotonic(), total, sum(done.values())
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
                raise stop.error(self._saved if self._books.saves else None)
            self._allow(heartbeat)

    def _allow(self, heartbeat: ServerHeartbeat) -> None:
        """Tells workers how far they may go now."""
        with self._lock:
            allowed = self._groups.allowed(self._done)
            changed, self._allowed = allowed != self._allowed, allowed
        if changed:
            heartbeat.wait_for(functools.partial(self._store.allow, allowed))
            self._queue.wake()

    def _report(self, done: Mapping[str, int]) -> None:
        with self._lock:
            arrived = self._arrived.take()
        self._count(done)
        self._books.report(arrived, done)

    def _count(self, done: Mapping[str, int]) -> None:
        """What is cheap to say often: how far tasks and workers are, and news."""
        while self._news:
            self._reporter.message(self._news.popleft())
        with self._lock:
            if (unfinite := self._arrived.unfinite) is not None:
                self._books.report([unfinite], done)
            workers = {
                worker: {
                    "state": "lost" if self._groups.is_down(worker) else "working" if worker in self._busy else "waiting",
                    "tasks": self._groups.tasks_of(worker),
                    "steps": sum(counts[worker] for counts in self.step_counts.steps.values()),
                    "steps_of": {task: counts[worker] for task, counts in self.step_counts.steps.items() if counts[worker]},
                }
                for worker in range(self._connection.workers)
            }
            tasks = {
                task: {"workers": self._groups.group(task), "interrupted": self.step_counts.interrupted[task]}
                for task in self._targets
            }
        self._reporter.progress(done)
        self._reporter.status.update(workers=workers, tasks=tasks)

    def _check_failures(self) -> None:
        with self._lock:
            failure = self._failures[0] if self._failures else None
        if isinstance(failure, errors.K4p1Error):
            raise failure
        if failure is not None:
            raise explained(failure) from failure

    def _check_workers(self, heartbeat: ServerHeartbeat) -> None:
        now = time.monotonic()
        with self._lock:
            for task, count in list(heartbeat.done.items()):
                self._done[task] = max(self._done[task], count)
            for worker, heard in self._heard.items():
                task, _ = self._busy.get(worker, (None, 0.0))
                usual = self._usual.get(task) if task else 0.0
                first = usual is None or worker not in self._worked
                patience = _FIRST_STEP_SECONDS if first else max(_SILENT_SECONDS, _SILENT_DISPATCHES * usual)
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
                saved = "nothing was saved (no model_dir)"
                if self._books.saves:
                    saved = f"saved at step {self._save(self._snapshot(heartbeat))}"
                raise errors.ClusterError(
                    f"task '{task}' has had no live worker for {self._policy.no_worker_timeout_s:g} s; {saved}; bring its "
                    "workers back and start again, or set borrow_workers = True"
                )
            self._reporter.message(f"task '{task}' borrows worker {borrowed}")

    def _snapshot(self, heartbeat: ServerHeartbeat) -> dict[str, np.ndarray]:
        """The state of a moment without steps in flight; a dispatch that does not return in time is not waited for."""
        heartbeat.wait_for(functools.partial(self._store.allow, dict.fromkeys(self._targets, 0)))
        try:
            without = {i for i, worker in enumerate(self._connection.present) if self._groups.is_down(worker)}
            heartbeat.wait_for(functools.partial(self._queue.pause, _PAUSE_SECONDS, without))
            return heartbeat.wait_for(self._store.snapshot)
        finally:
            self._go_on(heartbeat)

    def _go_on(self, heartbeat: ServerHeartbeat) -> None:
        with self._lock:
            self._allowed = {}
        self._queue.go_on()
        self._allow(heartbeat)

    def _save(self, snapshot: Mapping[str, np.ndarray]) -> int:
        with self._lock:
            done = dict(self._done)
        self._report(done)  # a loss that is not finite is reported before anything is saved
        self.step_counts.settle(snapshot, list(self._store.groups.values()))
        self._reporter.status.update(owners={o: {"missing": count} for o, count in self.step_counts.missing.items()})
        self._saved = self._books.save(snapshot)
        self._tell("saved", self._saved)
        return self._saved
