"""Learning rates as functions of a task's progress, its ticket divided by its step target.

Tasks of one run are paced to end together, so equal progress means equal time, and a schedule of progress gives all tasks
comparable learning rates at any moment, as K4P1 asks (section 5.3). K4P1 sets "the ratio of dataset size and the number of
epochs per learning rate decay step" equal for all tasks; read word for word that makes the decay period of a task grow with
the square of its data set. We read it by its stated aim: every task's decay period is the same fraction of its own step
target. `exponential(epochs=2.5)` takes as that fraction the mean, over the tasks, of 2.5 epochs divided by the step target.
"""

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf

from k4p1 import checks, errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """`factor(p) = min(1, p / warmup) * decay(p)` for progress p in [0, 1]; the learning rate is factor times the base.

    Attributes:
      warmup: fraction of the run during which the rate rises linearly from 0.
    """

    warmup: float = 0.0

    def __post_init__(self):
        if not 0 <= self.warmup < 1:
            raise errors.ConfigError(f"warmup={self.warmup}: expected a fraction of the run in [0, 1)")

    def factor(self, progress: tf.Tensor, epochs: Sequence[float]) -> tf.Tensor:
        """The factor at `progress` (scalar); `epochs` are the passes over its data that each task of the run makes."""
        decayed = self._decay(progress, epochs)
        return tf.minimum(progress / self.warmup, 1.0) * decayed if self.warmup else decayed

    def _decay(self, progress, epochs):
        raise TypeError(f"{type(self).__name__} must say how it decays")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """`decay(p) = 1`."""

    def _decay(self, progress, epochs):
        return tf.ones_like(progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """`decay(p) = end + (1 - end) (1 + cos(pi p)) / 2`.

    Attributes:
      end: share of the rate that is left at the end of the run.
    """

    end: float = 0.0

    def _decay(self, progress, epochs):
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + tf.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Schedule):
    """`decay(p) = rate ^ n`, n the number of `at_i / of` that progress p has reached.

    RA's authors: `Steps(at=(80, 100), of=120)`; PB, section 6: `Steps(at=(45,), of=60)`.

    Attributes:
      rate: factor of each step.
      at: when, increasing, in the unit of `of`.
      of: the length of the run in that unit, such as its epochs; 1 where `at` are fractions of the run.

    Raises:
      ConfigError: a rate that is not positive, or an `at` that does not increase or is outside the run.
    """

    rate: float = 0.1
    at: Sequence[float] = (0.5, 0.75)
    of: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        checks.check_number("Steps: rate", self.rate, checks.POSITIVE)
        checks.check_number("Steps: of", self.of, checks.POSITIVE)
        if isinstance(self.at, str) or not isinstance(self.at, Sequence) or not self.at:
            raise errors.ConfigError(f"Steps: at={self.at!r}; expected numbers such as (80, 100), with of=120")
        for number in self.at:
            checks.check_number("Steps: at", number, checks.POSITIVE)
        object.__setattr__(self, "at", tuple(self.at))
        if list(self.at) != sorted(set(self.at)) or self.at[-1] >= self.of:
            raise errors.ConfigError(f"Steps: at={self.at}, of={self.of}; expected increasing numbers below {self.of}")

    def _decay(self, progress, epochs):
        reached = [tf.cast(progress >= number / self.of, tf.float32) for number in self.at]
        return tf.pow(self.rate, tf.add_n(reached))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """`decay(p) = rate ^ floor(p / period)`, the period as a fraction of the run: see the module.

    Attributes:
      rate: factor of one decay step (K4P1, section 5: 0.98).
      epochs: passes over the data between two decay steps (K4P1: 2.5).
      staircase: False leaves out the floor.
    """

    rate: float = 0.98
    epochs: float = 2.5
    staircase: bool = True

    def period(self, epochs: Sequence[float]) -> float:
        """Progress between two decay steps, the same for all tasks."""
        return sum(self.epochs / e for e in epochs) / len(epochs)

    def _decay(self, progress, epochs):
        steps = progress / self.period(epochs)
        return tf.pow(self.rate, tf.floor(steps) if self.staircase else steps)


SCHEDULES = {"constant": Constant, "cosine": Cosine, "exponential": Exponential, "steps": Steps}


def find(schedule: "Schedule | str") -> Schedule:
    """The schedule itself, or the one of that name with its defaults.

    Raises:
      ConfigError: unknown name, or neither.
    """
    if isinstance(schedule, str):
        return make(schedule)
    if not isinstance(schedule, Schedule):
        raise errors.ConfigError(f"schedule={schedule!r}; expected a name or a Schedule")
    return schedule


def make(name: str, **settings: float | bool) -> Schedule:
    """The schedule `name` with settings.

    Raises:
      ConfigError: unknown name or setting.
    """
    if name not in SCHEDULES:
        raise errors.ConfigError(errors.unknown("schedule", name, SCHEDULES))
    fields = {field.name for field in dataclasses.fields(SCHEDULES[name])}
    for setting in settings:
        if setting not in fields:
            raise errors.ConfigError(errors.unknown(f"setting of schedule '{name}'", setting, fields))
    return SCHEDULES[name](**settings)
