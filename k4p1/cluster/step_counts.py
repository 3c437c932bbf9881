"""What became of the steps of a run on a cluster."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from k4p1.engine.groups import TRAINED, ParameterGroup
from k4p1.engine.store import COUNTS
from k4p1.patches.patched_model import SHARED


@dataclasses.dataclass
class StepCounts:
    """What a run on a cluster owes an account of.

    For every owner of parameters (`shared`, or a task): tickets = updates + late + overflowed + missing.

    Attributes:
      steps: steps that were reported, by task and worker, since the coordinator's last start.
      interrupted: dispatches that were lost with their worker or connection, by task: each may have lost one update.
      out_of_data: by task and worker, how often the input pipeline had no batch.
      tickets: steps taken, by task.
      late: updates that were dropped since they came too late, by task.
      overflowed: updates that were dropped since their gradients were not finite (mixed_float16), by task.
      updates: by owner, of its least updated vector.
      missing: tickets taken without an update that arrived, by owner.
    """

    steps: dict[str, Counter]
    interrupted: Counter
    out_of_data: dict[str, Counter] = dataclasses.field(default_factory=dict)
    tickets: dict[str, int] = dataclasses.field(default_factory=dict)
    late: dict[str, int] = dataclasses.field(default_factory=dict)
    overflowed: dict[str, int] = dataclasses.field(default_factory=dict)
    updates: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)

    def settle(self, snapshot: Mapping[str, np.ndarray], groups: Sequence[ParameterGroup]) -> None:
        """Takes the account from a snapshot of the store."""
        for task in self.steps:
            self.tickets[task] = int(snapshot[f"ticket/{task}"])
            self.late[task] = int(snapshot.get(f"{COUNTS}late/{task}", 0))
            self.overflowed[task] = int(snapshot.get(f"{COUNTS}overflowed/{task}", 0))
        self.updates, self.missing = {}, {}
        for group in groups:
            if group.role == TRAINED:
                owner = SHARED if len(group.users) > 1 else group.owner
                updates = int(snapshot[f"updates/{group.name}"])
                due = sum(self.tickets[task] - self.late[task] - self.overflowed[task] for task in group.users)
                if due - updates >= self.missing.get(owner, due - updates):
                    self.missing[owner], self.updates[owner] = due - updates, updates

    def as_json(self) -> dict[str, Any]:
        """Plain values for `result.json`."""
        return {
            "steps_by_worker": _by_worker(self.steps),
            "tickets": self.tickets,
            "updates": self.updates,
            "late_updates": self.late,
            "overflowed_updates": self.overflowed,
            "interrupted_steps": dict(self.interrupted),
            "missing_updates": self.missing,
            "out_of_data": _by_worker(self.out_of_data),
        }


def _by_worker(counts: Mapping[str, Mapping[int, int]]) -> dict[str, dict[str, int]]:
    return {task: {str(w): n for w, n in sorted(found.items())} for task, found in counts.items()}
