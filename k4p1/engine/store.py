"""Where parameters live while they are trained: one vector per group, whole in this process or in shards on servers."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from k4p1 import errors
from k4p1.engine.groups import FIXED, TRAINED, ParameterGroup
from k4p1.engine.sharding import ShardedVector

COUNTS = "count/"
"""How the names of those counters begin in a snapshot that only report what became of steps; a store may lack them."""
_FIRST_LOSS_SCALE = 2.0**15
_LOSS_SCALE_PATIENCE = 2000


class Store:
    """Vectors, optimizer state, update counts and step tickets as `tf.Variable`s.

    Args:
      groups: of the run; their Keras variables give the initial values, and they say how they are updated.
      steps: step target of each task; tickets 0 to target - 1 are issued once each.
      loss_scaled: whether the step needs a dynamic loss scale (mixed_float16).
      devices: every vector is cut into one shard per device. One process needs one: None, TensorFlow's default.

    Attributes:
      max_staleness: how many updates by others an update may come after; None: any number.
      damp_stale_updates: whether the rate is divided by 1 + that number.
    """

    max_staleness: int | None = None
    damp_stale_updates: bool = False

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        steps: Mapping[str, int],
        loss_scaled: bool = False,
        devices: Sequence[str | None] = (None,),
    ):
        self.groups = {group.name: group for group in groups}
        self.steps = dict(steps)
        self.devices = tuple(devices)
        self._vectors, self._slots, self._updates, self._optimizers = {}, {}, {}, {}
        for number, group in enumerate(groups):
            trained = group.role == TRAINED
            initial = group.initial()
            devices = self._shard_devices(number, initial.size)
            self._vectors[group.name] = ShardedVector(initial, devices, group.name, trained)
            if trained:
                optimizer = group.update.optimizer
                self._optimizers[group.name] = optimizer
                self._slots[group.name] = {
                    slot: ShardedVector(np.zeros_like(initial), devices, f"{group.name}.{slot}") for slot in optimizer.slots
                }
                with tf.device(self._counter_device(number)):
                    self._updates[group.name] = tf.Variable(0, dtype=tf.int64, name=f"updates_{group.name}")
        self._tickets, self._loss_scales = {}, {}
        for number, task in enumerate(steps):
            with tf.device(self._counter_device(number)):
                self._tickets[task] = tf.Variable(0, dtype=tf.int64, name=f"ticket_{task}")
                if loss_scaled:
                    self._loss_scales[task] = (tf.Variable(_FIRST_LOSS_SCALE), tf.Variable(0))

    def _shard_devices(self, number: int, size: int) -> Sequence[str | None]:
        """Where the shards of the vector with this number and size are, one device per shard."""
        return self.devices

    def _counter_device(self, number: int) -> str:
        return self.devices[number % len(self.devices)] or "CPU:0"  # counting up is an operation of CPUs

    def read(self, group: ParameterGroup) -> tf.Tensor:
        """The present vector of a group, float32 (n,)."""
        return self._vectors[group.name].read()

    def updates(self, group: ParameterGroup) -> tf.Tensor:
        """How many updates a trained group has had, int64."""
        return self._updates[group.name].read_value()

    def ticket(self, task: str) -> tf.Tensor:
        """How many tickets of a task are taken, int64."""
        return self._tickets[task].read_value()

    def take_ticket(self, task: str) -> tf.Tensor:
        """The number of the next step of a task, int64; fails with OutOfRangeError when its target is reached."""
        return count_up(self._tickets[task], self.steps[task])

    def apply_gradient(self, group: ParameterGroup, gradient: tf.Tensor, learning_rate: tf.Tensor) -> tf.Tensor:
        """One optimizer update of a trained group; returns how many it has had, this one included."""
        with tf.control_dependencies([gradient]):  # at the time of the update, not at the start of the step
            count = count_up(self._updates[group.name], tf.int64.max) + 1
        vector, slots = self._vectors[group.name], self._slots[group.name]
        for number, (shard, piece) in enumerate(zip(vector.shards, self._sent(vector, gradient), strict=True)):
            self._optimizers[group.name].update(
                shard,
                {slot: sharded.shards[number] for slot, sharded in slots.items()},
                piece,
                learning_rate,
                count,
                group.update.weight_decay,
            )
        return count

    def _sent(self, vector: ShardedVector, gradient: tf.Tensor) -> Sequence[tf.Tensor]:
        """The pieces of a gradient as they arrive at the shards, float32."""
        return vector.split(gradient)

    def move_statistics(self, group: ParameterGroup, new: tf.Tensor, read: tf.Tensor, momentum: Mapping[str, float]) -> None:
        """Moves a statistics group.

        Args:
          group: whose role is `statistics`.
          new: what a step made of `read`: `momentum * read + (1 - momentum) * batch`.
          read: the vector that the step read.
          momentum: by the names of the group; a statistic without one changes by a difference.
        """
        self._vectors[group.name].add(new - read)

    def count_dropped(self, task: str, late: tf.Tensor | None, lag: tf.Tensor | None) -> tf.Tensor:
        """Counts an update that is not applied: it came too late, or its gradients are not finite; returns its staleness."""
        return tf.zeros([], tf.int64) if lag is None else lag

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

    def vectors(self, snapshot: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The vectors by group name, on the host: those of a snapshot, or the present ones."""
        if snapshot is None:
            snapshot = {f"vector/{name}": vector.numpy() for name, vector in self._vectors.items()}
        fixed = (name for name in self.groups if f"vector/{name}" not in snapshot)
        return {
            **{key.removeprefix("vector/"): value for key, value in snapshot.items() if key.startswith("vector/")},
            **{name: self._vectors[name].numpy() for name in fixed},
        }

    def snapshot(self) -> dict[str, np.ndarray]:
        """All state of training, by name; what a checkpoint holds. Fixed vectors are left out: nothing changes them."""
        return {name: variable.numpy() for name, variable in self._state().items()}

    def restore(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Sets the state to that of a snapshot of a run with the same tasks.

        Raises:
          ArtifactError: names or shapes differ; nothing is changed then.
        """
        state = self._state()
        for name in sorted(name for name in set(state) | set(snapshot) if not name.startswith(COUNTS)):
            here, there = state.get(name), snapshot.get(name)
            if here is None or there is None or tuple(here.shape) != there.shape:
                raise errors.ArtifactError(f"the checkpoint is of another run: '{name}' does not fit")
        for name, variable in state.items():
            if name in snapshot:
                variable.assign(snapshot[name])

    def _state(self) -> dict[str, tf.Variable | ShardedVector]:
        state: dict[str, tf.Variable | ShardedVector] = {f"ticket/{task}": ticket for task, ticket in self._tickets.items()}
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


def count_up(counter: tf.Variable, limit: int) -> tf.Tensor:
    """The counter's value, which then grows by one: one atomic operation; OutOfRangeError at the limit."""
    with tf.device(counter.device):
        return tf.raw_ops.ResourceCountUpTo(resource=counter.handle, limit=limit, T=tf.int64)
