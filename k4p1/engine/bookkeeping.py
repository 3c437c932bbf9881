"""What a training loop keeps beside the parameters: reports, the joint best state, checkpoints, resuming."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.groups import ParameterGroup
from k4p1.engine.metrics import Metric
from k4p1.engine.population import PopulationStatistics
from k4p1.engine.pure import PureTask
from k4p1.engine.reporting import Reporter
from k4p1.engine.schedules import Schedule
from k4p1.engine.step import Loss
from k4p1.engine.store import Store

_SELECTION_BATCHES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTask:
    """What a training loop needs of a task.

    Attributes:
      pure: the task as a pure function.
      steps: step target.
      epochs: passes over its data that these steps make.
      batches: of (step, worker): endless training batches from a step on, a stream of its own for each worker.
      loss: its terms, of (batch, outputs).
      loss_terms: their names.
      metrics: by name.
      selecting: the metric that selects the best checkpoint.
      validation: validation batches, or None.
      calibration: training batches without augmentation, for population statistics.
      schedule: of its learning rates.
    """

    pure: PureTask
    steps: int
    epochs: float
    batches: Callable[..., tf.data.Dataset]
    loss: Loss
    loss_terms: Sequence[str]
    metrics: Mapping[str, Metric]
    selecting: str
    validation: Callable[[], Iterable] | None
    calibration: Callable[[], Iterable]
    schedule: Schedule

    @property
    def name(self) -> str:
        """The task's name."""
        return self.pure.name


class Evaluation(NamedTuple):
    """What evaluates the tasks of a run on vectors, traced once.

    Attributes:
      groups: of parameters, which name the vectors.
      evaluators: by task.
      population: measures population statistics of all tasks.
    """

    groups: Sequence[ParameterGroup]
    evaluators: Mapping[str, Evaluator]
    population: PopulationStatistics


class StepReport(NamedTuple):
    """What one step returned.

    Attributes:
      task: its name.
      step: the ticket.
      loss, examples, skipped, staleness, terms: see `StepResult`.
      worker: who took it; None in one process.
      count: how many steps this stands for: loss, terms and staleness are then means, examples and skipped are sums, `step`
        is the last ticket, or the first with a loss that is not finite.
      staleness_max: the largest staleness of these steps; None where there is one.
    """

    task: str
    step: int
    loss: float
    examples: float
    skipped: float
    staleness: float = 0.0
    worker: int | None = None
    terms: Mapping[str, float] = {}
    count: int = 1
    staleness_max: float | None = None


@dataclasses.dataclass
class Progress:
    """What the loop keeps beside the store's state: it goes into every checkpoint.

    Attributes:
      best: the highest mean validation metric so far; one that is better when smaller is negated.
      best_step: total steps at that moment, the last one where several are equal.
      improved_step: total steps when it last became better.
      skipped: corrupt images met, by task.
    """

    best: float = -math.inf
    best_step: int = 0
    improved_step: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "improved_step": self.improved_step,
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Progress":
        """The inverse of `as_json`."""
        best = -math.inf if value["best"] is None else value["best"]
        return cls(best, value["best_step"], value.get("improved_step", value["best_step"]), dict(value["skipped"]))


class Bookkeeping:
    """Reports, evaluates, saves and resumes a run.

    Args:
      tasks: with distinct names.
      store: holds the parameters.
      reporter: reports what happens.
      checkpoints: where states are saved; None for nowhere.
    """

    def __init__(self, tasks: Sequence[TrainingTask], store: Store, reporter: Reporter, checkpoints: Checkpoints | None):
        self._tasks = {task.name: task for task in tasks}
        self._store, self._reporter, self._checkpoints = store, reporter, checkpoints
        self.targets = {task.name: task.steps for task in tasks}
        self.progress = Progress(skipped=dict.fromkeys(self._tasks, 0))
        self._evaluators = {task.name: Evaluator(task.pure, task.metrics) for task in tasks}
        self._population = PopulationStatistics(
            [task.pure for task in tasks], {task.name: task.calibration for task in tasks}
        )
        self._validated = any(task.validation is not None for task in tasks)
        self._best: dict[str, np.ndarray] | None = None
        self._measured: tuple[dict[str, int], dict[str, np.ndarray]] | None = None
        self._saved_at = dict.fromkeys(self._tasks, 0)

    @property
    def evaluation(self) -> Evaluation:
        """What evaluates the tasks."""
        groups = {group.name: group for task in self._tasks.values() for group in task.pure.groups}
        return Evaluation(list(groups.values()), self._evaluators, self._population)

    @property
    def saved(self) -> str | None:
        """Where the last state was saved, as `k4p1 status` counts: `saved at step 5 (a 3/4, b 2/4)`; None: nowhere."""
        if self._checkpoints is None:
            return None
        return f"saved at step {sum(self._saved_at.values())} ({self._counted(self._saved_at)})"

    def _counted(self, done: Mapping[str, int]) -> str:
        return ", ".join(f"{task} {step}/{self.targets[task]}" for task, step in done.items())

    def resume(self) -> dict[str, int] | None:
        """Goes on from the newest checkpoint: the steps of each task there, or None without one."""
        found = self._checkpoints.newest() if self._checkpoints else None
        if found is None:
            self._reporter.resumed(self._store.done())
            return None
        self._store.restore(found.state)
        self.progress = Progress.from_json(found.progress)
        if (best := self._checkpoints.best()) is not None:  # it may be newer than the newest checkpoint
            kept = Progress.from_json(best.progress)
            self.progress = dataclasses.replace(kept, skipped=self.progress.skipped)
        done = self._store.done()
        self._saved_at = done
        self._reporter.message(f"resuming from the checkpoint at {self._counted(done)}")
        self._reporter.resumed(done)
        return done

    def report(self, reports: Sequence[StepReport], done: Mapping[str, int]) -> None:
        """Tells the reporter of the steps since the last report.

        Raises:
          DivergedError: a loss that is not finite; names task and step, and the worker on a cluster.
        """
        for report in reports:
            if not math.isfinite(report.loss):
                place = "" if report.worker is None else f" on worker {report.worker}"
                raise errors.DivergedError(
                    f"task '{report.task}', step {report.step}{place}: the loss is {report.loss}; lower its learning rate, "
                    "or look at its data"
                )
            if report.skipped and not self.progress.skipped[report.task]:
                self._reporter.message(f"task '{report.task}', step {report.step}: corrupt images are skipped")
            self.progress.skipped[report.task] += int(report.skipped)
        self._reporter.steps(done, reports)

    def evaluate(self, snapshot: Mapping[str, np.ndarray] | None = None) -> None:
        """Evaluates all tasks on their validation splits, and keeps the state if their mean is the best so far.

        Args:
          snapshot: of the store; by default, of now.
        """
        if not self._validated:
            return
        snapshot = self._store.snapshot() if snapshot is None else snapshot
        done = {task: int(snapshot[f"ticket/{task}"]) for task in self._tasks}
        vectors = self._store.vectors(snapshot)
        measured = self._population(vectors, _SELECTION_BATCHES)
        self._measured = done, {name: vector for name, vector in measured.items() if vector is not vectors[name]}
        selected = []
        for name, task in self._tasks.items():
            if task.validation is not None:
                metrics = self._evaluators[name](measured, task.validation())
                self._reporter.evaluated("validation", name, done[name], metrics)
                larger_is_better = task.metrics[task.selecting].larger_is_better
                selected.append(metrics[task.selecting] if larger_is_better else -metrics[task.selecting])
        if not all(np.isfinite(value).all() for value in snapshot.values()):
            self._reporter.message(f"the state after {sum(done.values())} steps is not finite; it is not kept as the best")
        elif float(np.mean(selected)) >= self.progress.best:
            best, total = float(np.mean(selected)), sum(done.values())
            improved = total if best > self.progress.best else self.progress.improved_step
            found = Progress(best, total, improved, self.progress.skipped)
            if self._checkpoints:
                self._checkpoints.save_best(snapshot, found.as_json())
            else:
                self._best = vectors
            self.progress = found

    def present_vectors(self) -> dict[str, np.ndarray]:
        """Those of now; with the population statistics that were measured, if this moment was evaluated."""
        statistics = self._measured[1] if self._measured and self._measured[0] == self._store.done() else {}
        return {**self._store.vectors(), **statistics}

    def settled(self, done: Mapping[str, int]) -> None:
        """Tells the reporter that steps were reported and evaluated."""
        self._reporter.settled(done)

    def ended(self, done: Mapping[str, int], why: str = "") -> None:
        """Tells the reporter that training has ended, and why, where that is before its target."""
        self._reporter.ended(done)
        if why:
            self._reporter.message(f"stopped at {self._counted(done)}: {why}")

    def save(self, snapshot: Mapping[str, np.ndarray] | None = None) -> int:
        """Writes a checkpoint of a snapshot of the store, by default of now; returns its total steps.

        Raises:
          DivergedError: a value is not finite; nothing is written then.
        """
        snapshot = self._store.snapshot() if snapshot is None else snapshot
        done = {task: int(snapshot[f"ticket/{task}"]) for task in self._tasks}
        total = sum(done.values())
        if self._checkpoints:
            for name, value in snapshot.items():
                if not np.isfinite(value).all():
                    raise errors.DivergedError(f"'{name}' is not finite after {total} steps; the checkpoint before it stays")
            self._checkpoints.save(total, snapshot, self.progress.as_json())
            self._saved_at = done
            self._reporter.saved(done)
        return total

    def best_vectors(self) -> dict[str, np.ndarray]:
        """The vectors of the joint best state by group name; without validation splits, the present ones."""
        if self._best is not None:
            return self._best
        best = self._checkpoints.best() if self._checkpoints and math.isfinite(self.progress.best) else None
        return self._store.vectors(best.state if best else None)
