"""What became of the steps of a run on a cluster."""

import dataclasses
from collections import Counter
from typing import Any


@dataclasses.dataclass
class StepCounts:
    """What a run on a cluster owes an account of.

    Attributes:
      steps: finished steps by task and worker.
      interrupted: steps that were lost with their worker or connection, by task: each may have lost its update.
      missing: tickets taken without an update that arrived, by owner of the parameters (`shared`, or a task).
    """

    steps: dict[str, Counter]
    interrupted: Counter
    missing: dict[str, int] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `result.json`."""
        return {
            "steps_by_worker": {task: {str(w): n for w, n in sorted(counts.items())} for task, counts in self.steps.items()},
            "interrupted_steps": dict(self.interrupted),
            "missing_updates": self.missing,
        }
