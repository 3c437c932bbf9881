"""The training loop of one machine: tasks take turns, are paced to end together, and share one best checkpoint."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from k4p1.engine.bookkeeping import Bookkeeping, Evaluation, Progress, StepReport, TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.data_errors import data_errors
from k4p1.engine.reporting import Reporter, Watcher
from k4p1.engine.step import Pace, StepResult, training_step
from k4p1.engine.stop_signal import StopSignal
from k4p1.engine.store import Store

_REPORT_SECONDS = 0.5
_UNREPORTED_STEPS = 100


def next_task(done: Mapping[str, int], targets: Mapping[str, int], stopped: Collection[str] = ()) -> str | None:
    """Whose turn it is: the task that has done the smallest share of its target; None when all are done, or `stopped`.

    So each task gets turns in proportion to its target, and all end together. A tie goes to the first task.
    """
    open_tasks = [task for task in targets if done[task] < targets[task] and task not in stopped]
    return min(open_tasks, key=lambda task: (done[task] + 1) / targets[task]) if open_tasks else None


class Trainer:
    """Trains the tasks of a run from where its newest checkpoint stands.

    Args:
      tasks: with distinct names.
      store: holds the parameters.
      reporter: reports what happens.
      checkpoints: where states are saved; None for nowhere.
      seed: of dropout.
      evaluate_every: total steps between evaluations on the validation splits.
      checkpoint_every: total steps between checkpoints.
      loss_scaled: True under mixed_float16.
      jit_compile: compile steps with XLA; on a CPU that is slower.
      patience: stop after so many evaluations in a row without a better state; None: never.
      callbacks: watchers of the reporter by task that may ask to stop it; with some, every step is reported at once.
    """

    def __init__(
        self,
        tasks: Sequence[TrainingTask],
        store: Store,
        reporter: Reporter,
        checkpoints: Checkpoints | None = None,
        *,
        seed: int = 0,
        evaluate_every: int,
        checkpoint_every: int,
        loss_scaled: bool = False,
        jit_compile: bool = False,
        patience: int | None = None,
        callbacks: Mapping[str, Watcher] | None = None,
    ):
        self._patience, self._callbacks = patience, callbacks or {}
        self._unreported_steps = 1 if callbacks else _UNREPORTED_STEPS
        self._tasks = {task.name: task for task in tasks}
        self._store = store
        self._evaluate_every, self._checkpoint_every = evaluate_every, checkpoint_every
        self._books = Bookkeeping(tasks, store, reporter, checkpoints)
        epochs = tuple(task.epochs for task in tasks)
        self._steps = {}
        for index, task in enumerate(tasks):
            pace = Pace(task.steps, epochs, seed, index)
            step = training_step(task.pure, store, task.loss, task.schedule, pace, loss_scaled)
            self._steps[task.name] = tf.function(lambda iterator, step=step: step(next(iterator)), jit_compile=jit_compile)

    @property
    def progress(self) -> Progress:
        """Best metric and skipped images so far."""
        return self._books.progress

    def present_vectors(self) -> dict[str, np.ndarray]:
        """The parameters of now by group, as the last evaluation saw them if it was now."""
        return self._books.present_vectors()

    @property
    def evaluation(self) -> Evaluation:
        """What evaluates the tasks."""
        return self._books.evaluation

    def run(self, stop_after: int | None = None) -> dict[str, np.ndarray]:
        """Trains to the step targets, or until it is stopped, and returns the vectors of the joint best state by group name.

        Without validation splits the last state is the best.

        Args:
          stop_after: train only so many more steps, for a trial.

        Raises:
          DivergedError: a loss that is not finite; names task and step.
          Preempted, Interrupted: on SIGTERM or SIGINT, after a checkpoint.
        """
        books, targets = self._books, self._books.targets
        books.resume()
        done = self._store.done()
        start = sum(done.values())
        iterators: dict[str, Any] = {}
        pending: list[tuple[str, int, StepResult]] = []
        last_report = time.monotonic()
        with StopSignal() as stop:
            while (task := next_task(done, targets, self._stopped())) is not None:
                if stop_after is not None and sum(done.values()) - start >= stop_after:
                    break
                if self._waited_enough(done):
                    break
                if task not in iterators:
                    iterators[task] = iter(self._tasks[task].batches(done[task]))
                pending.append((task, done[task], self._take_step(task, iterators[task])))
                done[task] += 1
                total = sum(done.values())
                evaluate = total % self._evaluate_every == 0 or done == targets
                save = total % self._checkpoint_every == 0 or done == targets
                late = time.monotonic() - last_report > _REPORT_SECONDS or len(pending) >= self._unreported_steps
                if evaluate or save or late or stop.caught:
                    books.report(_reports(pending), done)
                    pending, last_report = [], time.monotonic()
                if evaluate:
                    books.evaluate()
                if not pending:
                    books.settled(done)
                if save or stop.caught:
                    books.save()
                if stop.caught and done != targets:
                    raise stop.error(books.saved)
            books.report(_reports(pending), done)
            if stop_after is None:
                self._end(done)
        return books.best_vectors()

    def _stopped(self) -> list[str]:
        return [task for task, callbacks in self._callbacks.items() if callbacks.stops]

    def _waited_enough(self, done: Mapping[str, int]) -> bool:
        """Whether the last `patience` evaluations brought nothing better; counted in steps, so that a resumed run agrees."""
        best = self._books.progress.improved_step
        return self._patience is not None and best > 0 and sum(done.values()) - best >= self._patience * self._evaluate_every

    def _end(self, done: Mapping[str, int]) -> None:
        """The end of training, where it may have been stopped before its target."""
        books = self._books
        why = ""
        if done != books.targets:
            why = f"no better state in {self._patience} evaluations" if self._waited_enough(done) else "a callback asked to"
            if sum(done.values()) % self._evaluate_every:
                books.evaluate()
            books.save()
        books.ended(done, why)

    def _take_step(self, task: str, iterator: Any) -> StepResult:
        with data_errors(task):
            return self._steps[task](iterator)


def _reports(pending: Sequence[tuple[str, int, StepResult]]) -> list[StepReport]:
    return [
        StepReport(
            task,
            step,
            float(result.loss),
            float(result.examples),
            float(result.skipped),
            terms={name: float(value) for name, value in result.terms.items()},
        )
        for task, step, result in pending
    ]
