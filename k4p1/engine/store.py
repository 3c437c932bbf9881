"""Where parameters live while they are trained: one vector a group, in this process."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.groups import FIXED, TRAINED, ParameterGroup
from k4p1.engine.optimization import Optimization

_FIRST_LOSS_SCALE = 2.0**15
_LOSS_SCALE_PATIENCE = 2000


class LocalStore:
    """Vectors, optimizer state, update counts and step tickets as `tf.Variable`s of this process.

    Args:
      groups: of the run; their Keras variables give the initial values.
      optimization: which optimizer each group has.
      steps: step target of each task; tickets 0 to target - 1 are given out once each.
      loss_scaled: whether the step needs a dynamic loss scale (mixed_float16).
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        optimization: Optimization,
        steps: Mapping[str, int],
        loss_scaled: bool = False,
    ):
        self.groups = {group.name: group for group in groups}
        self.steps = dict(steps)
        self._vectors, self._slots, self._updates, self._optimizers = {}, {}, {}, {}
        for group in groups:
            trained = group.role == TRAINED
            self._vectors[group.name] = tf.Variable(group.initial(), trainable=trained, name=group.name)
            if trained:
                optimizer = optimization.optimizer_of(group.kind)
                self._optimizers[group.name] = optimizer
                with tf.device(self._vectors[group.name].device):
                    size = group.packing.size
                    self._slots[group.name] = {slot: tf.Variable(tf.zeros([size])) for slot in optimizer.slots}
                    self._updates[group.name] = tf.Variable(0, dtype=tf.int64)
        with tf.device("CPU:0"):
            self._tickets = {task: tf.Variable(0, dtype=tf.int64, name=f"ticket_{task}") for task in steps}
            self._loss_scales = {
                task: (tf.Variable(_FIRST_LOSS_SCALE), tf.Variable(0)) for task in (steps if loss_scaled else ())
            }

    def read(self, group: ParameterGroup) -> tf.Tensor:
        """The present vector of a group, float32 (n,)."""
        return self._vectors[group.name].read_value()

    def take_ticket(self, task: str) -> tf.Tensor:
        """The number of the next step of a task, int64; fails with OutOfRangeError when its target is reached."""
        with tf.device("CPU:0"):
            return tf.raw_ops.ResourceCountUpTo(resource=self._tickets[task].handle, limit=self.steps[task], T=tf.int64)

    def apply_gradient(self, group: ParameterGroup, gradient: tf.Tensor, learning_rate: tf.Tensor) -> None:
        """One optimizer update of a trained group."""
        count = self._updates[group.name].assign_add(1)
        self._optimizers[group.name].update(
            self._vectors[group.name],
            self._slots[group.name],
            gradient,
            learning_rate,
            count,
            group.weight_decay,
        )

    def add(self, group: ParameterGroup, delta: tf.Tensor) -> None:
        """Adds to a statistics group, atomically."""
        self._vectors[group.name].assign_add(delta)

    def loss_scale(self, task: str) -> tf.Tensor | None:
        """The factor of the loss under mixed_float16, or None."""
        return self._loss_scales[task][0].read_value() if task in self._loss_scales else None

    def report_gradients(self, task: str, finite: tf.Tensor) -> None:
        """Halves the loss scale after gradients that are not finite; doubles it after 2,000 steps in a row that were."""
        scale, good = self._loss_scales[task]
        grown = tf.where(good + 1 >= _LOSS_SCALE_PATIENCE, scale * 2.0, scale)
        scale.assign(tf.where(finite, grown, tf.maximum(scale / 2.0, 1.0)))
        good.assign(tf.where(finite, (good + 1) % _LOSS_SCALE_PATIENCE, 0))

    def done(self) -> dict[str, int]:
        """How many steps each task has taken."""
        return {task: int(ticket.numpy()) for task, ticket in self._tickets.items()}

    def vectors(self) -> dict[str, np.ndarray]:
        """The present vectors by group name, on the host."""
        return {name: vector.numpy() for name, vector in self._vectors.items()}

    def snapshot(self) -> dict[str, np.ndarray]:
        """All state of training, by name; what a checkpoint holds. Fixed vectors are left out: nothing changes them."""
        return {name: variable.numpy() for name, variable in self._state().items()}

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Sets the state to that of a snapshot of a run with the same tasks.

        Raises:
          ArtifactError: names or shapes differ; nothing is changed then.
        """
        state = self._state()
        for name in sorted(set(state) | set(snapshot)):
            here, there = state.get(name), snapshot.get(name)
            if here is None or there is None or tuple(here.shape) != there.shape:
                raise errors.ArtifactError(f"the checkpoint is of another run: '{name}' does not fit")
        for name, variable in state.items():
            variable.assign(snapshot[name])

    def set_vectors(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Writes vectors of some groups."""
        for name, value in vectors.items():
            self._vectors[name].assign(value)

    def _state(self) -> dict[str, tf.Variable]:
        state = {f"ticket/{task}": ticket for task, ticket in self._tickets.items()}
        for name, vector in self._vectors.items():
            if self.groups[name].role == FIXED:
                continue
            state[f"vector/{name}"] = vector
            state |= {f"slot/{name}/{slot}": variable for slot, variable in self._slots.get(name, {}).items()}
            if name in self._updates:
                state[f"updates/{name}"] = self._updates[name]
        for task, (scale, good) in self._loss_scales.items():
            state |= {f"loss_scale/{task}": scale, f"loss_scale_good/{task}": good}
        return state
