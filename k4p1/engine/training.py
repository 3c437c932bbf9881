"""The training loop of one machine: tasks take turns, are paced to end together, and share one best checkpoint."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.data_errors import data_errors
from k4p1.engine.evaluation import Evaluator, Metrics
from k4p1.engine.optimization import Optimization
from k4p1.engine.population import PopulationStatistics
from k4p1.engine.pure import PureTask
from k4p1.engine.reporting import Reporter
from k4p1.engine.step import Pace, training_step
from k4p1.engine.stop_signal import StopSignal

_REPORT_SECONDS = 0.5
_UNREPORTED_STEPS = 100
_SELECTION_BATCHES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingTask:
    """What the loop needs of a task.

    Attributes:
      pure: the task as a pure function.
      steps: step target.
      epochs: passes over its data that these steps make.
      batches: data set of training batches from a given step on, endless.
      loss: of (batch, logits).
      metrics: per-example metrics of (batch, logits).
      selecting: the metric that selects the best checkpoint.
      validation: validation batches, or None.
      calibration: training batches without augmentation, for population statistics.
      optimization: learning rate, schedule and multipliers of the task.
    """

    pure: PureTask
    steps: int
    epochs: float
    batches: Callable[[int], tf.data.Dataset]
    loss: Callable
    metrics: Metrics
    selecting: str
    validation: Callable[[], Iterable] | None
    calibration: Callable[[], Iterable]
    optimization: Optimization

    @property
    def name(self) -> str:
        """The task's name."""
        return self.pure.name


def next_task(done: Mapping[str, int], targets: Mapping[str, int]) -> str | None:
    """Whose turn it is: the task that has done the smallest share of its target; None when all are done.

    So each task gets turns in proportion to its target, and all end together. A tie goes to the first task.
    """
    open_tasks = [task for task in targets if done[task] < targets[task]]
    return min(open_tasks, key=lambda task: (done[task] + 1) / targets[task]) if open_tasks else None


@dataclasses.dataclass
class Progress:
    """What the loop keeps beside the store's state: it goes into every checkpoint.

    Attributes:
      best: the highest mean validation metric so far.
      best_step: total steps at that moment.
      skipped: corrupt images met, by task.
    """

    best: float = -math.inf
    best_step: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "best": self.best if math.isfinite(self.best) else None,
            "best_step": self.best_step,
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Progress":
        """The inverse of `as_json`."""
        best = -math.inf if value["best"] is None else value["best"]
        return cls(best, value["best_step"], dict(value["skipped"]))


class Trainer:
    """Trains the tasks of a run from where its newest checkpoint stands.

    Args:
      tasks: with distinct names.
      store: holds the parameters; see `LocalStore`.
      reporter: is told what happens.
      checkpoints: where states are saved; None for nowhere.
      seed: of dropout.
      evaluate_every: total steps between evaluations on the validation splits.
      checkpoint_every: total steps between checkpoints.
      loss_scaled: True under mixed_float16.
      jit_compile: compile steps with XLA; on a CPU that is slower.
    """

    def __init__(
        self,
        tasks: Sequence[TrainingTask],
        store: Any,
        reporter: Reporter,
        checkpoints: Checkpoints | None = None,
        *,
        seed: int = 0,
        evaluate_every: int,
        checkpoint_every: int,
        loss_scaled: bool = False,
        jit_compile: bool = False,
    ):
        self._tasks = {task.name: task for task in tasks}
        self._store, self._reporter, self._checkpoints = store, reporter, checkpoints
        self._evaluate_every, self._checkpoint_every = evaluate_every, checkpoint_every
        self._targets = {task.name: task.steps for task in tasks}
        self._evaluators = {task.name: Evaluator(task.pure, task.metrics) for task in tasks}
        self._population = PopulationStatistics(
            [task.pure for task in tasks], {task.name: task.calibration for task in tasks}
        )
        self.progress = Progress(skipped=dict.fromkeys(self._tasks, 0))
        epochs = tuple(task.epochs for task in tasks)
        self._steps = {}
        for index, task in enumerate(tasks):
            pace = Pace(task.steps, epochs, seed, index)
            step = training_step(task.pure, store, task.loss, task.optimization, pace, loss_scaled)
            self._steps[task.name] = tf.function(lambda iterator, step=step: step(next(iterator)), jit_compile=jit_compile)

    def run(self, stop_after: int | None = None) -> dict[str, np.ndarray]:
        """Trains to the step targets and returns the vectors of the joint best state, by group name.

        Without validation splits the last state is the best.

        Args:
          stop_after: train only so many more steps, for a trial.

        Raises:
          DivergedError: a loss that is not finite; names task and step.
          Preempted, Interrupted: on SIGTERM or SIGINT, after a checkpoint.
        """
        self._resume()
        done = self._store.done()
        start = sum(done.values())
        last_saved = start
        iterators: dict[str, Any] = {}
        pending: list[tuple[str, int, Any]] = []
        last_report = time.monotonic()
        with StopSignal() as stop:
            while (task := next_task(done, self._targets)) is not None:
                if stop_after is not None and sum(done.values()) - start >= stop_after:
                    break
                if task not in iterators:
                    iterators[task] = iter(self._tasks[task].batches(done[task]))
                pending.append((task, done[task], self._take_step(task, iterators[task])))
                done[task] += 1
                total = sum(done.values())
                evaluate = total % self._evaluate_every == 0 or done == self._targets
                save = total % self._checkpoint_every == 0 or done == self._targets
                late = time.monotonic() - last_report > _REPORT_SECONDS or len(pending) >= _UNREPORTED_STEPS
                if evaluate or save or late or stop.caught:
                    self._report(pending, done)
                    pending, last_report = [], time.monotonic()
                if evaluate:
                    self._evaluate(done)
                if save or stop.caught:
                    self._save(total)
                    last_saved = total
                if stop.caught and done != self._targets:
                    raise stop.error(last_saved if self._checkpoints else None)
            self._report(pending, done)
        return self._best_vectors()

    def _take_step(self, task: str, iterator: Any) -> Any:
        with data_errors(task):
            return self._steps[task](iterator)

    def _report(self, pending: Sequence[tuple[str, int, Any]], done: Mapping[str, int]) -> None:
        losses: dict[str, list[float]] = {}
        examples: dict[str, float] = {}
        for task, step, result in pending:
            loss = float(result.loss)
            if not math.isfinite(loss):
                raise errors.DivergedError(
                    f"task '{task}', step {step}: the loss is {loss}; lower its learning rate, or look at its data"
                )
            losses.setdefault(task, []).append(loss)
            examples[task] = examples.get(task, 0.0) + float(result.examples)
            skipped = int(result.skipped)
            if skipped and not self.progress.skipped[task]:
                self._reporter.message(f"task '{task}', step {step}: corrupt images are skipped")
            self.progress.skipped[task] += skipped
        self._reporter.steps(done, {task: float(np.mean(values)) for task, values in losses.items()}, examples)

    def _evaluate(self, done: Mapping[str, int]) -> None:
        """Evaluates all tasks on their validation splits, and keeps the state if their mean is the best so far."""
        selected = []
        vectors = self._store.vectors()
        validated = any(task.validation is not None for task in self._tasks.values())
        measured = self._population(vectors, _SELECTION_BATCHES) if validated else vectors
        for name, task in self._tasks.items():
            if task.validation is not None:
                metrics = self._evaluators[name](measured, task.validation())
                self._reporter.evaluated("validation", name, done[name], metrics)
                selected.append(metrics[task.selecting])
        if selected and float(np.mean(selected)) >= self.progress.best:
            self.progress.best, self.progress.best_step = float(np.mean(selected)), sum(done.values())
            if self._checkpoints:
                self._checkpoints.save_best(self._store.snapshot(), self.progress.as_json())
            else:
                self._best = vectors

    _best: dict[str, np.ndarray] | None = None

    def _best_vectors(self) -> dict[str, np.ndarray]:
        vectors = self._store.vectors()
        if self._best is not None:
            return self._best
        best = self._checkpoints.best() if self._checkpoints and math.isfinite(self.progress.best) else None
        if best is not None:
            vectors |= {
                name.removeprefix("vector/"): value for name, value in best.state.items() if name.startswith("vector/")
            }
        return vectors

    def _save(self, total: int) -> None:
        if self._checkpoints:
            self._checkpoints.save(total, self._store.snapshot(), self.progress.as_json())

    def _resume(self) -> None:
        found = self._checkpoints.newest() if self._checkpoints else None
        if found is None:
            return
        self._store.restore(found.state)
        self.progress = Progress.from_json(found.progress)
        steps = ", ".join(f"{task} {step}/{self._targets[task]}" for task, step in self._store.done().items())
        self._reporter.message(f"going on from the checkpoint at {steps}")
