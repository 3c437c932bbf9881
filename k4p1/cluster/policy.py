"""How a run uses its workers."""

import dataclasses

from k4p1 import checks, errors

TRANSPORTS = ("float32", "bfloat16")


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
      silence_timeout_s: after so many seconds a process that has fallen silent counts as lost.
      steps_per_dispatch: how many steps a worker may take before it reports, for half a second at most.
      max_staleness: an update that comes after more than so many others is dropped; None: 20 per worker.
      damp_stale_updates: divide the learning rate by 1 + the number of other updates since the step read its vectors.
      transport: `float32`; `bfloat16` halves the bytes of trained vectors and gradients on the way.
    """

    share_workers: bool = False
    reassign_workers: bool = False
    borrow_workers: bool = False
    no_worker_timeout_s: float = 300.0
    max_lead: float = 0.05
    startup_timeout_s: float = 600.0
    silence_timeout_s: float = 60.0
    steps_per_dispatch: int = 16
    max_staleness: int | None = None
    damp_stale_updates: bool = False
    transport: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(field.default, bool):
                checks.check_flag(field.name, getattr(self, field.name))
        for name in ("no_worker_timeout_s", "max_lead", "startup_timeout_s", "silence_timeout_s"):
            checks.check_number(name, getattr(self, name), checks.POSITIVE)
        for name in ("steps_per_dispatch", "max_staleness"):
            if getattr(self, name) is not None:
                checks.check_number(name, getattr(self, name), checks.POSITIVE_WHOLE)
        if self.transport not in TRANSPORTS:
            raise errors.ConfigError(errors.unknown("transport", self.transport, TRANSPORTS))
