"""Checks of settings that users give, with one sentence for what is wrong."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable

from k4p1.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The numbers that a setting may be.

    Attributes:
      words: what messages say is expected.
      holds: whether a finite number is one of them.
      whole: whether they are whole numbers.
    """

    words: str
    holds: Callable[[float], bool]
    whole: bool = False


POSITIVE = Numbers("a positive number", lambda value: value > 0)
POSITIVE_WHOLE = Numbers("a positive whole number", lambda value: value > 0, whole=True)
WHOLE = Numbers("a whole number", lambda _: True, whole=True)
AT_LEAST_ZERO = Numbers("a number of at least 0", lambda value: value >= 0)
SHARE = Numbers("a number in [0, 1)", lambda value: 0 <= value < 1)


def check_number(what: str, value: object, allowed: Numbers) -> None:
    """Raises ConfigError unless a value is one of the allowed numbers; booleans and text are none.

    Args:
      what: the setting, for the message `{what}={value}; expected {words}`.
      value: as given.
      allowed: such as `POSITIVE`.
    """
    kind = numbers.Integral if allowed.whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or not allowed.holds(value):
        raise ConfigError(f"{what}={value!r}; expected {allowed.words}")


def check_flag(what: str, value: object) -> None:
    """Raises ConfigError unless a value is True or False: the text `no` would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{what}={value!r}; expected True or False")


def is_task_name(name: str) -> bool:
    """Whether a text can be the name of a task."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None


def check_task_name(name: object) -> None:
    """Raises ConfigError unless a name can be a task's: it names files and Keras models."""
    if not isinstance(name, str) or not is_task_name(name):
        raise ConfigError(f"task name {name!r}: expected ASCII letters, digits, '_', '-' and '.'")
