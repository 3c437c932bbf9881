"""Parameters on parameter servers."""

import uuid
from collections.abc import Mapping, Sequence

import tensorflow as tf

from k4p1.engine.groups import FIXED, ParameterGroup
from k4p1.engine.store import Store


class ServerStore(Store):
    """A store whose vectors are cut into one shard per server; updates run there, fused and locked.

    Fixed vectors, the frozen weights of the backbone, do not travel at every step: each worker keeps a copy on the device
    that computes, which it takes from the servers in its first step and again after it was restarted.

    Args:
      groups, steps, loss_scaled: see `Store`.
      devices: the CPUs of the servers.
      resident: False reads fixed vectors at every step.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        steps: Mapping[str, int],
        loss_scaled: bool = False,
        *,
        devices: Sequence[str],
        resident: bool = True,
    ):
        super().__init__(groups, steps, loss_scaled, devices)
        self._resident, self._copies = resident, f"k4p1_{uuid.uuid4().hex}"
        self._beats = []
        for device in devices:
            with tf.device(device):
                self._beats.append(tf.Variable(0, name="heartbeat"))

    def read(self, group: ParameterGroup) -> tf.Tensor | dict[str, tf.Tensor]:
        """The present vector of a group; of a fixed one that the worker keeps, its tensors by name."""
        if group.role != FIXED or not self._resident:
            return super().read(group)
        packing = group.packing
        copies = [
            tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=shape, shared_name=f"{self._copies}/{group.name}/{number}")
            for number, shape in enumerate(packing.shapes)
        ]

        def fetched() -> list[tf.Tensor]:
            tensors = list(packing.unpack(super(ServerStore, self).read(group)).values())
            first = [
                tf.raw_ops.AssignVariableOp(resource=copy, value=tensor)
                for copy, tensor in zip(copies[:-1], tensors[:-1], strict=True)
            ]
            with tf.control_dependencies(first):  # the last one says that all are there
                tf.raw_ops.AssignVariableOp(resource=copies[-1], value=tensors[-1])
            return tensors

        def kept() -> list[tf.Tensor]:
            return [tf.raw_ops.ReadVariableOp(resource=copy, dtype=tf.float32) for copy in copies]

        tensors = tf.cond(tf.raw_ops.VarIsInitializedOp(resource=copies[-1]), kept, fetched)
        return {
            name: tf.ensure_shape(tensor, shape)
            for name, tensor, shape in zip(packing.names, tensors, packing.shapes, strict=True)
        }

    def beat(self) -> None:
        """Reads a value from every server; raises what TensorFlow raises where one is gone or was restarted."""
        for beat in self._beats:
            beat.numpy()

    def step_bytes(self, task: str) -> int:
        """Bytes of the vectors that a step of a task reads (weights, statistics) and writes (gradients, changes)."""
        groups = [group for group in self.groups.values() if task in group.users]
        resident = FIXED if self._resident else None
        return sum(4 * group.packing.size * (1 if group.role == FIXED else 2) for group in groups if group.role != resident)
