"""Which worker serves which task, whose turn it is, and which groups have no worker left. Plain Python, no TensorFlow."""

import dataclasses
import math
from collections.abc import Mapping

from k4p1 import errors
from k4p1.cluster.policy import WorkerPolicy

ALARM_SECONDS = 15.0
"""A group whose workers are all silent for so long raises an alarm."""


@dataclasses.dataclass(frozen=True)
class WorkerRequest:
    """How many workers a task needs: a number, or a share of those that no other task names.

    Attributes:
      workers: number, or None.
      share: relative to the other tasks that name no number.
    """

    workers: int | None = None
    share: float = 1.0


def assign(requests: Mapping[str, WorkerRequest], workers: int, share_workers: bool = False) -> dict[str, tuple[int, ...]]:
    """The first workers of each task.

    Raises:
      ConfigError: fewer workers than tasks without `share_workers`, or fewer than the tasks name.
    """
    tasks = list(requests)
    named = {task: request.workers for task, request in requests.items() if request.workers is not None}
    least = sum(named.values()) + len(tasks) - len(named)
    if len(tasks) > workers and share_workers:
        if any(count > 1 for count in named.values()):
            raise errors.ConfigError(f"{workers} workers are shared by {len(tasks)} tasks: none can have several for itself")
        return {task: (number % workers,) for number, task in enumerate(tasks)}
    if least > workers:
        reason = f"name {sum(named.values())} workers for {len(named)} of them and " if named else ""
        raise errors.ConfigError(
            f"{len(tasks)} tasks {reason}need at least {least} workers, the cluster has {workers}; add workers, name fewer, "
            "or set share_workers = True"
        )
    counts = dict(named)
    others = [task for task in tasks if task not in named]
    if others:
        counts |= _divide(workers - sum(named.values()), {task: requests[task].share for task in others})
    groups, first = {}, 0
    for task in tasks:
        groups[task] = tuple(range(first, first + counts[task]))
        first += counts[task]
    return groups


def _divide(workers: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers of at least 1 that add up to `workers`, as near to the shares as that goes."""
    counts = dict.fromkeys(shares, 1)
    total = sum(shares.values())
    for _ in range(workers - len(shares)):
        behind = max(shares, key=lambda task: shares[task] / total * workers - counts[task])
        counts[behind] += 1
    return counts


class WorkerGroups:
    """The state of the groups of a run.

    Args:
      requests: of each task.
      targets: steps of each task.
      workers: how many there are.
      policy: of the run.
      paced: whether tasks must end together (`WorkerPolicy.max_lead`).
    """

    def __init__(
        self,
        requests: Mapping[str, WorkerRequest],
        targets: Mapping[str, int],
        workers: int,
        policy: WorkerPolicy,
        paced: bool = True,
    ):
        self._targets, self._policy, self._paced = dict(targets), policy, paced
        self._groups = {task: set(group) for task, group in assign(requests, workers, policy.share_workers).items()}
        self._borrowed: dict[str, set[int]] = {task: set() for task in targets}
        self._down: dict[int, float] = {}
        self._alarmed: set[str] = set()
        self._workers = range(workers)

    def group(self, task: str) -> list[int]:
        """The workers that serve a task, borrowed ones included."""
        return sorted(self._groups[task] | self._borrowed[task])

    def tasks_of(self, worker: int) -> list[str]:
        """The tasks that a worker serves."""
        return [task for task in self._targets if worker in self._groups[task] or worker in self._borrowed[task]]

    def idle(self) -> list[int]:
        """Workers without a task."""
        return [worker for worker in self._workers if not self.tasks_of(worker)]

    def next_task(self, worker: int, issued: Mapping[str, int], done: Mapping[str, int]) -> str | None:
        """The task whose step a worker takes next; None if it has none to take now.

        Of its tasks that is the one that is furthest behind. While tasks are paced, one that leads the slowest by more than
        `max_lead` waits.

        Args:
          worker: its index.
          issued: steps of each task that are done or in flight.
          done: steps of each task that are done.
        """
        slowest = self._slowest(done)
        ready = [
            task
            for task in self.tasks_of(worker)
            if issued[task] < self._targets[task] and not self._leads(task, issued[task], slowest)
        ]
        return min(ready, key=lambda task: (issued[task] + 1) / self._targets[task]) if ready else None

    def allowed(self, done: Mapping[str, int]) -> dict[str, int]:
        """Up to which count the steps of each task may go on now."""
        slowest = self._slowest(done)
        return {
            task: min(target, math.floor(slowest * target + self._lead(task)) + 1) if self._paced else target
            for task, target in self._targets.items()
        }

    def _slowest(self, done: Mapping[str, int]) -> float:
        return min(done[task] / self._targets[task] for task in self._targets)

    def _lead(self, task: str) -> float:
        return max(self._policy.max_lead * self._targets[task], len(self.group(task)))

    def _leads(self, task: str, issued: int, slowest: float) -> bool:
        return self._paced and issued - slowest * self._targets[task] > self._lead(task)

    def lost(self, worker: int, now: float) -> None:
        """A worker is gone since `now`, seconds of any clock."""
        self._down.setdefault(worker, now)

    def back(self, worker: int) -> None:
        """A worker is there; what was borrowed in its place goes back."""
        self._down.pop(worker, None)
        for task in self._targets:
            if worker in self._groups[task]:
                self._borrowed[task].clear()
                self._alarmed.discard(task)

    def is_down(self, worker: int) -> bool:
        """Whether a worker is lost."""
        return worker in self._down

    def dead(self, now: float, done: Mapping[str, int]) -> dict[str, float]:
        """Tasks with steps to do and no live worker, with the seconds since the last one was lost."""
        found = {}
        for task, target in self._targets.items():
            group = self.group(task)
            if done[task] < target and group and all(worker in self._down for worker in group):
                found[task] = now - max(self._down[worker] for worker in group)
        return found

    def alarms(self, now: float, done: Mapping[str, int]) -> list[str]:
        """Tasks whose group has just been dead for `ALARM_SECONDS`; each is named once, until a worker is back."""
        new = [t for t, seconds in self.dead(now, done).items() if seconds >= ALARM_SECONDS and t not in self._alarmed]
        self._alarmed |= set(new)
        return new

    def overdue(self, now: float, done: Mapping[str, int]) -> list[str]:
        """Tasks whose group has been dead for longer than `no_worker_timeout_s`."""
        return [task for task, seconds in self.dead(now, done).items() if seconds >= self._policy.no_worker_timeout_s]

    def borrow(self, task: str) -> int | None:
        """Lends a task the live worker whose own group is largest; None if no worker is alive."""
        alive = [worker for worker in self._workers if worker not in self._down]
        if not alive:
            return None
        size = {t: sum(w not in self._down for w in self.group(t)) for t in self._targets}
        worker = max(alive, key=lambda w: min((size[t] for t in self.tasks_of(w)), default=len(self._workers)))
        self._borrowed[task].add(worker)
        return worker

    def reassign(self, done: Mapping[str, int]) -> dict[int, str]:
        """Gives workers whose tasks are finished to the open task with the most remaining steps per worker: {worker: task}.

        Without `reassign_workers` nothing changes.
        """
        moved: dict[int, str] = {}
        if not self._policy.reassign_workers:
            return moved
        for worker in self._workers:
            left = {t: self._targets[t] - done[t] for t in self._targets if done[t] < self._targets[t]}
            if worker in self._down or not left or any(t in left for t in self.tasks_of(worker)):
                continue
            task = max(left, key=lambda t: left[t] / max(len(self.group(t)), 1))
            for group in self._groups.values():
                group.discard(worker)
            self._groups[task].add(worker)
            moved[worker] = task
        return moved
