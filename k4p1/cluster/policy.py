"""How a run uses its workers."""

import dataclasses

from k4p1 import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerPolicy:
    """Who works for whom, and what happens when workers are lost.

    Attributes:
      share_workers: workers may serve several tasks where there are fewer workers than tasks.
      reassign_workers: the workers of a finished task join the task with the most remaining steps per worker.
      borrow_workers: a task without a live worker borrows one of another task; False: the run stops with exit 75.
      no_worker_timeout_s: how long a task waits for its workers before that.
      max_lead: how far, as a share of its steps, a task may be ahead of the slowest one while shared weights train, so that
        all end together.
      startup_timeout_s: how long to wait for servers and workers at the start.
    """

    share_workers: bool = False
    reassign_workers: bool = False
    borrow_workers: bool = False
    no_worker_timeout_s: float = 300.0
    max_lead: float = 0.05
    startup_timeout_s: float = 600.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                checks.check_flag(field.name, getattr(self, field.name))
        for name in ("no_worker_timeout_s", "max_lead", "startup_timeout_s"):
            checks.check_number(name, getattr(self, name), checks.POSITIVE)
