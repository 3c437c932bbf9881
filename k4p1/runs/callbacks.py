"""Callbacks of Keras in a run: each task calls its own as `keras.Model.fit` would.

`on_train_begin`, `on_epoch_begin`, `on_train_batch_begin/end`, `on_epoch_end`, `on_train_end`; an epoch is one pass over the
task's training images. Logs of a batch hold its `loss`; those of an epoch the mean loss, and the newest validation metrics,
`val_accuracy` and so on: with callbacks a run is evaluated once per epoch unless `evaluate_every` says otherwise.
`self.model` is the task model, at the end of an epoch with the values that its logs were measured with. The learning rate
follows the run's schedule, and the run writes files for TensorBoard: callbacks that do either are refused. `stop_training`
ends the task, on one machine; on a cluster the methods of epochs are called, and nothing stops. What a run returns is its
best state, whatever a callback restored.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from k4p1 import errors
from k4p1.engine.reporting import Watcher

_SCHEDULE = "the learning rate follows OptimizerConfig(schedule=...)"
_REFUSED = {
    keras.callbacks.ReduceLROnPlateau: _SCHEDULE,
    keras.callbacks.LearningRateScheduler: _SCHEDULE,
    keras.callbacks.TensorBoard: "a run with a model_dir writes files for TensorBoard by itself",
}
Callbacks = Sequence[keras.callbacks.Callback] | Mapping[str, Sequence[keras.callbacks.Callback]]


def by_task(callbacks: Callbacks, tasks: Sequence[str]) -> dict[str, list[keras.callbacks.Callback]]:
    """The callbacks of each task that has some.

    Raises:
      ConfigError: an unknown task, a list for several tasks, or something that is no callback.
    """
    if not isinstance(callbacks, Mapping):
        callbacks = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else callbacks
        if callbacks and len(tasks) > 1:
            raise errors.ConfigError(
                f"callbacks belong to one task each, and the run has {len(tasks)}; give {{'{tasks[0]}': [...]}}"
            )
        callbacks = {tasks[0]: callbacks} if callbacks else {}
    for task, listed in callbacks.items():
        if task not in tasks:
            raise errors.ConfigError(errors.unknown("task of callbacks", task, tasks))
        for callback in listed:
            if not isinstance(callback, keras.callbacks.Callback):
                raise errors.ConfigError(f"callbacks of task '{task}': {callback!r} is no keras.callbacks.Callback")
            for kind, instead in _REFUSED.items():
                if isinstance(callback, kind):
                    raise errors.ConfigError(f"callbacks of task '{task}': {kind.__name__} cannot be used; {instead}")
    return {task: list(listed) for task, listed in callbacks.items() if listed}


class TaskCallbacks(Watcher):
    """Calls the callbacks of one task.

    Args:
      task: its name.
      callbacks: its callbacks.
      model: the task model.
      steps: its step target.
      steps_per_epoch: of one pass over its training images.
      refresh: writes the present values into the model; None: nothing does.
    """

    def __init__(
        self,
        task: str,
        callbacks: Sequence[keras.callbacks.Callback],
        model: keras.Model,
        steps: int,
        steps_per_epoch: int,
        refresh: Callable[[], None] | None,
    ):
        self._task, self._target, self._per_epoch, self._refresh = task, steps, steps_per_epoch, refresh
        epochs = -(-steps // steps_per_epoch)
        self._list = keras.callbacks.CallbackList(
            list(callbacks), add_history=False, model=model, epochs=epochs, steps=steps_per_epoch
        )
        self._model, self._metrics = model, {}
        self._step: int | None = None
        self._losses: list[float] = []
        self._epoch_ended = False
        self._ended = False

    @property
    def stops(self) -> bool:
        """Whether a callback asked to stop."""
        return bool(getattr(self._model, "stop_training", False))

    def resumed(self, done: Mapping[str, int]) -> None:
        """Begins, or goes on, at the step of a checkpoint."""
        self._step = done.get(self._task, 0)
        self._model.stop_training = False
        self._list.on_train_begin()
        if self._step < self._target:
            self._list.on_epoch_begin(self._step // self._per_epoch)

    def steps(self, done: Mapping[str, int], reports: Sequence[Any]) -> None:
        """One call per batch; on a cluster, where a report stands for several, the batches of a report are one."""
        if self._step is None:
            self.resumed({self._task: 0})
        for report in reports:
            if report.task != self._task:
                continue
            self.settled(done)
            batch = self._step % self._per_epoch
            self._list.on_train_batch_begin(batch)
            self._step += report.count
            self._losses.append(report.loss)
            self._list.on_train_batch_end(batch, {"loss": report.loss})
            self._epoch_ended = self._step // self._per_epoch > (self._step - report.count) // self._per_epoch
            self._epoch_ended |= self._step >= self._target

    def evaluated(self, split: str, task: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps the newest validation metrics."""
        if task == self._task and split == "validation":
            self._metrics = {f"val_{name}": value for name, value in metrics.items() if name != "examples"}

    def settled(self, done: Mapping[str, int]) -> None:
        """Ends the epoch whose last batch has come, once the evaluation behind it has."""
        if not self._epoch_ended:
            return
        self._epoch_ended = False
        if self._refresh is not None:
            self._refresh()
        is_last = self._step >= self._target
        epoch = (self._step - 1) // self._per_epoch if is_last else self._step // self._per_epoch - 1
        self._list.on_epoch_end(epoch, {"loss": sum(self._losses) / len(self._losses), **self._metrics})
        self._losses = []
        if self._step < self._target and not self.stops:
            self._list.on_epoch_begin(epoch + 1)

    def ended(self, done: Mapping[str, int]) -> None:
        """Ends training."""
        self.settled(done)
        if not self._ended:
            self._ended = True
            self._list.on_train_end(self._metrics)
