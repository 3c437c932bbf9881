"""Which worker takes which steps, and what is known of it: the side of the training loop that workers' threads call."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from k4p1 import errors
from k4p1.cluster.several_steps import Results
from k4p1.cluster.step_counts import StepCounts
from k4p1.cluster.tensorflow_private import PullQueue, Step
from k4p1.cluster.worker_groups import WorkerGroups
from k4p1.cluster.worker_reports import WorkerReports
from k4p1.engine.bookkeeping import StepReport

_SILENT_SECONDS = 10.0
_FIRST_STEP_SECONDS = 120.0
_SILENT_DISPATCHES = 20
_MOST_EMPTY = 3


class StepDispatcher:
    """Gives steps to workers that ask; see `tensorflow_private.Dispatcher`.

    Args:
      queue: that workers ask.
      present: the workers by TensorFlow's number.
      groups: which worker serves which task; used under this object's lock alone.
      targets: steps of each task.
      reports: takes what steps return.

    Attributes:
      done: steps of each task that are known to be taken.
      allowed: up to which count the steps of each task may go on.
      traced: the function and the iterator of each task.
      step_counts: what became of the steps.
      failure: what ended a step for good; None while nothing did.
    """

    def __init__(
        self,
        queue: PullQueue,
        present: Sequence[int],
        groups: WorkerGroups,
        targets: Mapping[str, int],
        reports: WorkerReports,
    ):
        self._queue, self._present, self._groups, self._targets = queue, present, groups, targets
        self._reports = reports
        self.step_counts = StepCounts({task: Counter() for task in targets}, Counter())
        self.step_counts.out_of_data = {task: Counter() for task in targets}
        self.done = dict.fromkeys(targets, 0)
        self.allowed: dict[str, int] = {}
        self.traced: dict[str, tuple[Any, Any]] = {}
        self.failure: Exception | None = None
        self._lock = threading.RLock()
        self._in_flight: Counter = Counter()
        self._news: deque[str] = deque()
        self._heard: dict[int, float] = {}
        self._worked: set[int] = set()
        self._given_up: set[int] = set()
        self._busy: dict[int, tuple[str, float]] = {}
        self._usual: dict[str, float] = {}
        self._made: dict[tuple[str, int], Step] = {}

    # What workers' threads call; TensorFlow numbers the workers that are present.

    def next_step(self, worker: int) -> Step | None:
        """See `Dispatcher`."""
        worker = self._present[worker]
        with self._lock:
            self._is_back(worker)
            issued = {task: self.done[task] + self._in_flight[task] for task in self._targets}
            task = self._groups.next_task(worker, issued, self.done)
            if task is None or self.failure is not None or self.done[task] >= self.allowed.get(task, 0):
                return None
            self._in_flight[task] += 1
            self._busy[worker] = (task, time.monotonic())
            if (task, worker) not in self._made:
                self._made[task, worker] = Step(task, *self.traced[task], self._queue)
            return self._made[task, worker]

    def finished(self, step: Step, worker: int, result: np.ndarray | None) -> None:
        """See `Dispatcher`."""
        worker = self._present[worker]
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
                    self._fail(errors.DataError(f"{place}: its input pipeline ended before its steps were done"))
            if not len(results.rows):
                return
            self._usual[step.task] = time.monotonic() - started
            self._worked.add(worker)
            self.done[step.task] = max(self.done[step.task], int(results.rows[-1, 3]) + 1)
            self.step_counts.steps[step.task][worker] += len(results.rows)
            self._reports.add(step.task, worker, results.rows)

    def interrupted(self, step: Step) -> None:
        """See `Dispatcher`."""
        worker = self._present[step.worker]
        with self._lock:
            self._has_ended(step.task, worker)
            self._busy.pop(worker, None)
            self.step_counts.interrupted[step.task] += 1
            self._is_lost(worker, time.monotonic())

    def failed(self, error: Exception) -> None:
        """See `Dispatcher`."""
        with self._lock:
            if hasattr(error, "k4p1_worker"):
                error.k4p1_worker = self._present[error.k4p1_worker]
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error

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

    # What the training loop calls.

    def begin(self, workers: Iterable[int]) -> None:
        """From here on workers are watched; those that are not present count as lost."""
        now = time.monotonic()
        with self._lock:
            self._heard = dict.fromkeys(self._present, now)
            for worker in workers:
                if worker not in self._heard:
                    self._is_lost(worker, now)

    def moment(self) -> tuple[dict[str, int], bool]:
        """(steps of each task, whether none is in flight)."""
        with self._lock:
            return dict(self.done), not +self._in_flight

    def allow(self) -> dict[str, int] | None:
        """Sets `allowed` anew; None while every task has at least half the room that it could have: that saves messages."""
        with self._lock:
            allowed, done, before = self._groups.allowed(self.done), self.done, self.allowed
            if before and all(2 * (before[task] - done[task]) >= allowed[task] - done[task] for task in allowed):
                return None
            self.allowed = allowed
            return dict(allowed)

    def look_around(self, done: Mapping[str, int]) -> tuple[list[str], list[str], dict[int, str]]:
        """Gives up workers that are silent.

        Args:
          done: steps by the servers' count.

        Returns:
          (tasks to raise an alarm for, tasks without workers for too long, workers moved).
        """
        now = time.monotonic()
        with self._lock:
            for task, count in done.items():
                self.done[task] = max(self.done[task], count)
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
            alarms, overdue = self._groups.alarms(now, self.done), self._groups.overdue(now, self.done)
            return alarms, overdue, self._groups.reassign(self.done)

    def borrow(self, task: str) -> int | None:
        """See `WorkerGroups`."""
        with self._lock:
            return self._groups.borrow(task)

    def lost(self) -> set[int]:
        """The lost workers, by TensorFlow's number."""
        with self._lock:
            return {number for number, worker in enumerate(self._present) if self._groups.is_down(worker)}

    def take_reports(self) -> list[StepReport]:
        """What steps have returned since the last call."""
        with self._lock:
            return self._reports.take()

    def take_news(self) -> tuple[list[str], StepReport | None]:
        """(what happened to workers since the last call, the first step whose loss was not finite)."""
        with self._lock:
            news, self._news = list(self._news), deque()
            return news, self._reports.unfinite

    def described(self, workers: Iterable[int]) -> dict[str, dict]:
        """Workers and tasks for `status.json`."""
        with self._lock:
            steps = self.step_counts.steps
            return {
                "workers": {
                    worker: {
                        "state": self._state(worker),
                        "tasks": self._groups.tasks_of(worker),
                        "steps": sum(counts[worker] for counts in steps.values()),
                        "steps_of": {task: counts[worker] for task, counts in steps.items() if counts[worker]},
                    }
                    for worker in workers
                },
                "tasks": {
                    task: {"workers": self._groups.group(task), "interrupted": self.step_counts.interrupted[task]}
                    for task in self._targets
                },
            }

    def _state(self, worker: int) -> str:
        return "lost" if self._groups.is_down(worker) else "working" if worker in self._busy else "waiting"
