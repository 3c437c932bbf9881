"""Parameter groups: which variables of the tasks of a run share a vector."""

import dataclasses
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from k4p1 import errors
from k4p1.engine.optimization import Optimization
from k4p1.engine.packing import Packing
from k4p1.patches.patched_layer import FIXED, RANDOM, STATISTICS, TRAINED
from k4p1.patches.patched_model import SHARED, Parameter, PatchedModel


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters with the same owner, users, role, learning rate and decay: one flat vector.

    Attributes:
      name: readable and unique in a run.
      owner: `shared`, or the name of the task.
      users: the tasks whose step reads the group.
      role: `trained`, `fixed` or `statistics`.
      kind: patch kind, `head` or `backbone`; decides on optimizer and multiplier.
      rate: `head`, `patch` or `shared`.
      weight_decay: of its parameters.
      packing: where each parameter stands.
      variables: the Keras variables, in order.
    """

    name: str
    owner: str
    users: tuple[str, ...]
    role: str
    kind: str
    rate: str
    weight_decay: float
    packing: Packing
    variables: tuple[keras.Variable, ...]

    def initial(self) -> np.ndarray:
        """The present values of the Keras variables as a vector."""
        values = [keras.ops.convert_to_numpy(v) for v in self.variables]
        return self.packing.pack_numpy(dict(zip(self.packing.names, values, strict=True)))


def plan_groups(
    models: Mapping[str, PatchedModel], optimization: Optimization, examples: Mapping[str, int] | None = None
) -> list[ParameterGroup]:
    """Groups the parameters of all tasks of a run.

    Which group a parameter is in follows from its owner, role and kind, never from `layer.trainable`. Seeds are in none.

    Args:
      models: by task.
      optimization: rates and decays.
      examples: training images of each task, for a decay `by_size`.

    Raises:
      ConfigError: one task freezes what another one moves.
    """
    parameters: dict[int, Parameter] = {}
    users: dict[int, list[str]] = {}
    for task, patched in models.items():
        for parameter in patched.parameters:
            if parameter.role == RANDOM:
                continue
            known = parameters.setdefault(id(parameter.variable), parameter)
            if known.role != parameter.role:
                raise errors.ConfigError(
                    f"task '{task}' wants shared parameter '{parameter.key}' {parameter.role}, task "
                    f"'{users[id(parameter.variable)][0]}' wants it {known.role}; give both the same policy in their "
                    "patch specs"
                )
            users.setdefault(id(parameter.variable), []).append(task)
    members: dict[tuple, list[Parameter]] = {}
    for identity, parameter in parameters.items():
        owner = SHARED if parameter.owner == SHARED else users[identity][0]
        rate = "head" if parameter.kind == "head" else SHARED if owner == SHARED else "patch"
        size = None if examples is None else examples.get(users[identity][0])
        decay = optimization.decay_of(rate, parameter.kind, len(parameter.variable.shape), size)
        key = (
            owner,
            tuple(users[identity]),
            parameter.role,
            parameter.kind,
            rate,
            decay if parameter.role == TRAINED else 0.0,
        )
        members.setdefault(key, []).append(parameter)
    return [_group(*key, parameters=listed, taken=index) for index, (key, listed) in enumerate(members.items())]


def _group(owner, users, role, kind, rate, decay, parameters: Sequence[Parameter], taken: int) -> ParameterGroup:
    packing = Packing(tuple(p.key for p in parameters), tuple(tuple(p.variable.shape) for p in parameters))
    name = f"{taken:02d}.{owner}.{kind}.{role}"
    return ParameterGroup(name, owner, users, role, kind, rate, decay, packing, tuple(p.variable for p in parameters))


def write_back(groups: Sequence[ParameterGroup], vectors: Mapping[str, np.ndarray]) -> None:
    """Writes trained vectors into the Keras variables, so that the task models hold them."""
    for group in groups:
        if group.role == FIXED:
            continue
        values = group.packing.unpack_numpy(vectors[group.name])
        for name, variable in zip(group.packing.names, group.variables, strict=True):
            variable.assign(values[name])


def of_task(groups: Sequence[ParameterGroup], task: str, role: str | None = None) -> list[ParameterGroup]:
    """The groups that a task's step uses, of one role if given."""
    return [group for group in groups if task in group.users and role in (None, group.role)]


__all__ = ["FIXED", "STATISTICS", "TRAINED", "ParameterGroup", "of_task", "plan_groups", "write_back"]
