"""What the fields of a file must be: a table per format, and one sentence for the field that is wrong.

A file that is whole (its hash is right) may still hold anything: it was altered and hashed again, or another program
wrote it. Fields that a table does not name are left alone, so that a later version may add some.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from k4p1 import checks, errors

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """What a value may be.

    Attributes:
      words: what messages say is expected.
      holds: whether a value is that.
      default: where the field is missing; without one it must be there.
    """

    words: str
    holds: Callable[[Any], bool]
    default: Any = _REQUIRED

    def or_missing(self, default: Any) -> "Field":
        """The same; a missing field has the value `default`."""
        return dataclasses.replace(self, default=default)

    def or_none(self) -> "Field":
        """The same, or null; null where it is missing."""
        return Field(f"{self.words} or null", lambda value: value is None or self.holds(value), None)


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")  # JSON may hold halves of characters
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Field("text", _is_text)
TRUTH = Field("true or false", lambda value: isinstance(value, bool))
NUMBER = Field("a number", _is_number)
MEASURED = Field("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool))  # NaN is one
WHOLE = Field("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
COUNT = Field("a whole number of at least 0", lambda value: WHOLE.holds(value) and value >= 0)
SHARE = Field(checks.SHARE.words, lambda value: _is_number(value) and checks.SHARE.holds(value))
SCALAR = Field("text, a number, true, false or null", lambda v: v is None or TRUTH.holds(v) or _is_number(v) or _is_text(v))
HASH = Field("a SHA-256 in hex", lambda value: _is_text(value) and re.fullmatch(r"[0-9a-f]{64}", value) is not None)
HASH_OR_EMPTY = Field(f"{HASH.words}, or nothing", lambda value: value == "" or HASH.holds(value))
TASK_NAME = Field("the name of a task", lambda value: _is_text(value) and checks.is_task_name(value))
ANYTHING = Field("anything", lambda value: True)
OBJECT = Field("an object", lambda value: isinstance(value, dict))


def one_of(allowed: Any) -> Field:
    """One of some texts."""
    return Field(f"one of {', '.join(sorted(allowed))}", lambda value: _is_text(value) and value in allowed)


def list_of(item: Field, least: int = 0) -> Field:
    """A list of at least `least` values."""
    words = f"a list of {f'at least {least} of ' if least else ''}{item.words}"
    return Field(words, lambda value: isinstance(value, list) and len(value) >= least and all(map(item.holds, value)))


def object_of(value: Field) -> Field:
    """An object of any names, all of whose values are alike."""
    holds = value.holds
    return Field(
        f"an object of {value.words}",
        lambda given: isinstance(given, dict) and all(_is_text(k) and holds(v) for k, v in given.items()),
    )


def check(what: str, values: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """`values` with the defaults of fields that are missing.

    Args:
      what: path, for messages.
      values: as read.
      fields: by name.

    Raises:
      ArtifactError: no object, a field that is missing, or one that holds something else than it may.
    """
    if not isinstance(values, Mapping):
        raise errors.ArtifactError(f"{what} holds {_shown(values)}; expected an object")
    checked = dict(values)
    for name, field in fields.items():
        if name not in checked:
            if field.default is _REQUIRED:
                raise errors.ArtifactError(f"{what} has no field '{name}'; expected {field.words}")
            checked[name] = field.default
        elif not field.holds(checked[name]):
            raise errors.ArtifactError(f"{what}: field '{name}' is {_shown(checked[name])}; expected {field.words}")
    return checked


def parse(what: str, text: str) -> Any:
    """The value of a JSON text.

    Raises:
      ArtifactError: no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError) as e:
        raise errors.ArtifactError(f"cannot read {what}: {str(e).splitlines()[0][:100]}") from e
    except RecursionError as e:
        raise errors.ArtifactError(f"cannot read {what}: it is nested too deeply") from e


def read(path: pathlib.Path, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The object of a JSON file, checked.

    Raises:
      ArtifactError: it cannot be read, or is not what it should be.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise errors.ArtifactError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
    return check(str(path), parse(str(path), text), fields)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
