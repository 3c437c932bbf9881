"""Parameter groups: which variables of the tasks of a run share a vector."""

import dataclasses
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from k4p1 import errors
from k4p1.engine.packing import Packing
from k4p1.engine.rules import Rules, Update
from k4p1.patches.patched_layer import FIXED, RANDOM, STATISTICS, TRAINED
from k4p1.patches.patched_model import Parameter, PatchedModel


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterGroup:
    """Parameters with the same owner, users, role, kind and way of being updated: one flat vector.

    Attributes:
      name: readable and unique in a run.
      owner: `shared`, or the name of the task.
      users: the tasks whose step reads the group.
      role: `trained`, `fixed` or `statistics`.
      kind: patch kind, `head` or `backbone`.
      packing: where each parameter stands.
      variables: the Keras variables, in order.
      updates: how each user's steps update it; empty unless it is trained by rules.
    """

    name: str
    owner: str
    users: tuple[str, ...]
    role: str
    kind: str
    packing: Packing
    variables: tuple[keras.Variable, ...]
    updates: Mapping[str, Update] = dataclasses.field(default_factory=dict)

    @property
    def update(self) -> Update:
        """How it is updated: optimizer and weight decay, which all its users share."""
        return next(iter(self.updates.values()))

    def initial(self) -> np.ndarray:
        """The present values of the Keras variables as a vector."""
        values = [keras.ops.convert_to_numpy(v) for v in self.variables]
        return self.packing.pack_numpy(dict(zip(self.packing.names, values, strict=True)))


def plan_groups(models: Mapping[str, PatchedModel], rules: Rules | None = None) -> list[ParameterGroup]:
    """Groups the parameters of all tasks of a run.

    Which group a parameter is in follows from its owner, role, kind and the rules, never from `layer.trainable`. Seeds are
    in none.

    Args:
      models: by task.
      rules: how parameters are updated, where they are to be trained.

    Raises:
      ConfigError: one task freezes what another one moves, or updates it by another optimizer.
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
                    f"task '{task}' needs shared parameter '{parameter.key}' {parameter.role}, task "
                    f"'{users[id(parameter.variable)][0]}' needs it {known.role}; give both the same policy in their "
                    "patch specs"
                )
            users.setdefault(id(parameter.variable), []).append(task)
    members: dict[tuple, list[Parameter]] = {}
    updates: dict[tuple, dict[str, Update]] = {}
    for identity, parameter in parameters.items():
        owner = parameter.owner_in(users[identity][0])
        how = _updates(parameter, users[identity], rules) if parameter.role == TRAINED and rules else {}
        key = (owner, tuple(users[identity]), parameter.role, parameter.kind, tuple(how.values()))
        members.setdefault(key, []).append(parameter)
        updates.setdefault(key, how)
    return [
        _group(*key[:4], parameters=listed, number=number, updates=updates[key])
        for number, (key, listed) in enumerate(members.items())
    ]


def _updates(parameter: Parameter, users: Sequence[str], rules: Rules) -> dict[str, Update]:
    """How each user updates a parameter; optimizer and decay belong to the vector, so that users must agree on them."""
    found = {task: rules.update_of(parameter, task) for task in users}
    first = found[users[0]]
    for task, update in found.items():
        if update.optimizer != first.optimizer:
            raise errors.ConfigError(
                f"tasks '{users[0]}' and '{task}' share '{parameter.key}' and update it by different optimizers; give their "
                "rules the same one"
            )
    return {task: dataclasses.replace(update, weight_decay=first.weight_decay) for task, update in found.items()}


def _group(owner, users, role, kind, parameters: Sequence[Parameter], number: int, updates) -> ParameterGroup:
    packing = Packing(tuple(p.key for p in parameters), tuple(tuple(p.variable.shape) for p in parameters))
    name = f"{number:02d}.{owner}.{kind}.{role}"
    return ParameterGroup(name, owner, users, role, kind, packing, tuple(p.variable for p in parameters), updates)


def freeze(models: Mapping[str, PatchedModel], rules: Rules) -> dict[str, PatchedModel]:
    """The task models with the parameters that rules freeze turned from `trained` to `fixed`."""
    frozen = {}
    for task, patched in models.items():
        listed = [
            dataclasses.replace(p, role=FIXED) if p.role == TRAINED and rules.update_of(p, task).frozen else p
            for p in patched.parameters
        ]
        frozen[task] = dataclasses.replace(patched, parameters=tuple(listed))
    return frozen


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


__all__ = ["FIXED", "STATISTICS", "TRAINED", "ParameterGroup", "freeze", "of_task", "plan_groups", "write_back"]
