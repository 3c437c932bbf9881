"""Parameters on parameter servers."""

import uuid
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from k4p1.engine.groups import FIXED, TRAINED, ParameterGroup
from k4p1.engine.sharding import ShardedVector
from k4p1.engine.store import COUNTS, Store, count_up

FLOAT32, BFLOAT16 = "float32", "bfloat16"
_SMALL = 16_384
_MOST = 1 << 27
_COPIES = "k4p1_copy"


class ServerStore(Store):
    """A store whose vectors are cut into shards on servers; updates run there, fused and locked.

    A vector of up to 16,384 values stays whole, on one server in turn; a longer one has a shard on every server, or several
    where a shard would exceed 512 MiB (TensorFlow sends no message above 2 GiB).

    Fixed vectors, the frozen weights of the backbone, do not travel at every step: each worker keeps a copy on the device
    that computes, which it takes from the servers in its first step and again after it was restarted. A later store takes
    the place of the copies.

    Args:
      groups, steps, loss_scaled: see `Store`.
      devices: the CPUs of the servers.
      resident: False reads fixed vectors at every step.
      transport: `bfloat16` halves the bytes of trained vectors and their gradients; the servers' values stay float32.
      max_staleness, damp_stale_updates: see `Store`.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        steps: Mapping[str, int],
        loss_scaled: bool = False,
        *,
        devices: Sequence[str],
        resident: bool = True,
        transport: str = FLOAT32,
        max_staleness: int | None = None,
        damp_stale_updates: bool = False,
    ):
        super().__init__(groups, steps, loss_scaled, devices)
        self.max_staleness, self.damp_stale_updates = max_staleness, damp_stale_updates
        self._resident, self._version = resident, uuid.uuid4().int >> 66
        self._halved = transport == BFLOAT16
        self._beats, self._allowed, self._late, self._overflowed = [], {}, {}, {}
        for device in devices:
            with tf.device(device):
                self._beats.append(tf.Variable(0, dtype=tf.int64, name="heartbeat"))
        for task, ticket in self._tickets.items():
            with tf.device(ticket.device):
                self._allowed[task] = tf.Variable(0, dtype=tf.int64, name=f"allowed_{task}")
                self._late[task] = tf.Variable(0, dtype=tf.int64, name=f"late_{task}")
                self._overflowed[task] = tf.Variable(0, dtype=tf.int64, name=f"overflowed_{task}")
        self._functions: dict[str, tf.types.experimental.Callable] = {}

    def _shard_devices(self, number: int, size: int) -> list[str]:
        servers = len(self.devices)
        if size <= _SMALL:
            return [self.devices[number % servers]]
        return [self.devices[i % servers] for i in range(max(servers, -(-size // _MOST)))]

    def read(self, group: ParameterGroup) -> tf.Tensor | dict[str, tf.Tensor]:
        """The present vector of a group; of a fixed one that the worker keeps, its tensors by name."""
        if group.role == FIXED and self._resident:
            return self._read_kept(group)
        if group.role == TRAINED and self._halved:
            parts = []
            for shard in self._vectors[group.name].shards:
                with tf.device(shard.device):
                    parts.append(tf.cast(shard.read_value(), tf.bfloat16))
            return tf.cast(tf.concat(parts, axis=0), tf.float32)
        return super().read(group)

    def _read_kept(self, group: ParameterGroup) -> dict[str, tf.Tensor]:
        packing = group.packing
        copies = [
            tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=shape, shared_name=f"{_COPIES}/{group.name}/{number}")
            for number, shape in enumerate(packing.shapes)
        ]
        version = tf.raw_ops.VarHandleOp(dtype=tf.int64, shape=[], shared_name=f"{_COPIES}/{group.name}/version")

        def fetched() -> list[tf.Tensor]:
            tensors = list(packing.unpack(super(ServerStore, self).read(group)).values())
            assigned = [
                tf.raw_ops.AssignVariableOp(resource=copy, value=tensor)
                for copy, tensor in zip(copies, tensors, strict=True)
            ]
            with tf.control_dependencies(assigned):  # the version says that all are there, and whose they are
                tf.raw_ops.AssignVariableOp(resource=version, value=tf.constant(self._version, tf.int64))
            return tensors

        def kept() -> list[tf.Tensor]:
            return [tf.raw_ops.ReadVariableOp(resource=copy, dtype=tf.float32) for copy in copies]

        ours = tf.cond(
            tf.raw_ops.VarIsInitializedOp(resource=version),
            lambda: tf.equal(tf.raw_ops.ReadVariableOp(resource=version, dtype=tf.int64), self._version),
            lambda: tf.constant(False),
        )
        tensors = tf.cond(ours, kept, fetched)
        return {
            name: tf.ensure_shape(tensor, shape)
            for name, tensor, shape in zip(packing.names, tensors, packing.shapes, strict=True)
        }

    def next_ticket(self, task: str) -> tf.Tensor:
        """The number of the next step of a task, int64; at or above its target there is no such step."""
        return count_up(self._tickets[task], tf.int64.max)

    def may_step(self, task: str) -> tf.Tensor:
        """Whether a task has steps left that `allow` permits, bool; decided on its server."""
        ticket = self._tickets[task]
        with tf.device(ticket.device):
            return ticket.read_value() < tf.minimum(self._allowed[task].read_value(), self.steps[task])

    def _sent(self, vector: ShardedVector, gradient: tf.Tensor) -> Sequence[tf.Tensor]:
        if not self._halved:
            return vector.split(gradient)
        pieces = []
        for shard, piece in zip(vector.shards, vector.split(tf.cast(gradient, tf.bfloat16)), strict=True):
            with tf.device(shard.device):
                pieces.append(tf.cast(piece, tf.float32))
        return pieces

    def move_statistics(self, group: ParameterGroup, new: tf.Tensor, read: tf.Tensor, momentum: Mapping[str, float]) -> None:
        """`v <- v - (1 - m) v + (1 - m) batch`, with the v of the moment: a stale read enters no delayed loop."""
        vector = self._vectors[group.name]
        named = zip(group.packing.names, group.packing.shapes, strict=True)
        kept = group.packing.pack_numpy({name: np.full(shape, momentum.get(name, 1.0)) for name, shape in named})
        sizes = np.cumsum(vector.sizes)[:-1]
        change = vector.split(new - kept * read)
        for shard, piece, rest in zip(vector.shards, change, np.split(1.0 - kept, sizes), strict=True):
            rest = rest[0] if (rest == rest[0]).all() else rest
            with tf.device(shard.device), tf.control_dependencies([piece]):
                shard.assign_add(piece - rest * shard.read_value())

    def count_dropped(self, task: str, late: tf.Tensor | None, lag: tf.Tensor | None) -> tf.Tensor:
        """See `Store`."""
        was_late = tf.constant(False) if late is None else late
        for counter, counts in ((self._late[task], was_late), (self._overflowed[task], ~was_late)):
            with tf.device(counter.device):
                counter.assign_add(tf.cast(counts, tf.int64))
        return tf.zeros([], tf.int64) if lag is None else lag

    def prepare(self) -> None:
        """Traces what the coordinator calls during training: registering a function later would wait for every worker."""
        state, tickets = self._state(), list(self._tickets.values())

        def read_all() -> list[tf.Tensor]:
            parts = [part for value in state.values() for part in getattr(value, "shards", [value])]
            return [tf.identity(part.read_value()) for part in parts]

        def read_counts() -> tf.Tensor:
            beats = [beat.read_value() for beat in self._beats]
            return tf.stack([tf.identity(counter) for counter in (*(ticket.read_value() for ticket in tickets), *beats)])

        def allow(counts: tf.Tensor) -> None:
            for number, allowed in enumerate(self._allowed.values()):
                with tf.device(allowed.device):
                    allowed.assign(counts[number])

        self._functions["snapshot"] = tf.function(read_all).get_concrete_function()
        if tickets:
            self._functions["counts"] = tf.function(read_counts).get_concrete_function()
            self._functions["allow"] = tf.function(allow).get_concrete_function(tf.TensorSpec([len(tickets)], tf.int64))

    def _function(self, name: str) -> tf.types.experimental.Callable:
        if not self._functions:
            self.prepare()
        return self._functions[name]

    def allow(self, counts: Mapping[str, int]) -> None:
        """Steps of each task go on up to these counts; after 0 all workers stop when their present step is done."""
        self._function("allow")(tf.constant([counts[task] for task in self._tickets], tf.int64))

    def done(self) -> dict[str, int]:
        """How many steps each task has taken; asks every server, and raises what TensorFlow raises where one is gone."""
        counts = self._function("counts")().numpy() if self._tickets else []
        return {task: min(int(count), self.steps[task]) for task, count in zip(self._tickets, counts, strict=False)}

    def snapshot(self) -> dict[str, np.ndarray]:
        """All state of training, read in one graph; of one moment if no step is in flight."""
        found = iter(part.numpy() for part in self._function("snapshot")())
        snapshot = {}
        for name, value in self._state().items():
            parts = [next(found) for _ in getattr(value, "shards", [value])]
            snapshot[name] = np.concatenate(parts) if hasattr(value, "shards") else parts[0]
        for task, steps in self.steps.items():  # workers that find no step left count on
            snapshot[f"ticket/{task}"] = np.minimum(snapshot[f"ticket/{task}"], steps)
        return snapshot

    def _state(self) -> dict[str, tf.Variable | ShardedVector]:
        counts = {"late": self._late, "overflowed": self._overflowed}
        return super()._state() | {
            f"{COUNTS}{kind}/{task}": counter for kind, counters in counts.items() for task, counter in counters.items()
        }

    def step_bytes(self, task: str) -> int:
        """Bytes of the vectors that a step of a task reads (weights, statistics) and writes (gradients, changes)."""
        groups = [group for group in self.groups.values() if task in group.users]
        resident = FIXED if self._resident else None
        return sum(
            (2 if self._halved and group.role == TRAINED else 4) * group.packing.size * (1 if group.role == FIXED else 2)
            for group in groups
            if group.role != resident
        )
