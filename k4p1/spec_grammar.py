"""The small language of specs: `name(option=value,option=value)+name`, for patches, augmentations and losses.

The terms of a loss may have weights, `0.5*name(option=value)`. A value in quotes may hold any character.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

_TERM = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<options>[^()]*)\))?\s*")
_OPTION = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?P<value>[^\s=,()+]+)\s*")
_WEIGHT = re.compile(r"\s*(?P<weight>\d+(?:\.\d*)?(?:[eE]-?\d+)?)\s*\*(?P<term>.*)", re.DOTALL)
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}
_PLACE = re.compile("\x00(\\d+)\x00")


def parse(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The (name, options as text) pairs of a spec, in order.

    Raises:
      ValueError: bad syntax; one line that shows the part that cannot be read.
    """
    hidden, quoted = _hide(text)
    for term in hidden.split("+"):
        yield _term(term, text, quoted, "name(option=value)+name")


def parse_weighted(text: str) -> Iterator[tuple[float, str, dict[str, str]]]:
    """The (weight, name, options as text) triples of a weighted sum, in order; a weight that is not given is 1.

    Raises:
      ValueError: bad syntax; one line that shows the part that cannot be read.
    """
    hidden, quoted = _hide(text)
    for term in hidden.split("+"):
        match = _WEIGHT.fullmatch(term)
        weight, rest = (float(match["weight"]), match["term"]) if match else (1.0, term)
        yield weight, *_term(rest, text, quoted, "0.5*name(option=value)+name")


def read(text: str, expected: type) -> Any:
    """The value of an option: a truth value, a finite number, or text.

    Raises:
      ValueError: `expected ...`.
    """
    if expected not in _TYPE_NAMES:
        return text
    try:
        value = {"true": True, "false": False}[text.lower()] if expected is bool else expected(text)
        if math.isfinite(value):
            return value
    except (KeyError, ValueError):
        pass
    raise ValueError(f"expected {_TYPE_NAMES[expected]}")


def _term(term: str, text: str, quoted: list[str], form: str) -> tuple[str, dict[str, str]]:
    match = _TERM.fullmatch(term)
    if not match:
        raise ValueError(f"cannot read {_show(term.strip(), quoted)!r} in {text!r}; write {form}")
    listed = (match["options"] or "").strip()
    options: dict[str, str] = {}
    for option in listed.split(",") if listed else ():
        parsed = _OPTION.fullmatch(option)
        if not parsed:
            raise ValueError(f"cannot read option {_show(option.strip(), quoted)!r} in {text!r}; write option=value")
        if parsed["name"] in options:
            raise ValueError(f"option '{parsed['name']}' is given twice in {text!r}")
        options[parsed["name"]] = _PLACE.sub(lambda place: quoted[int(place[1])], parsed["value"])
    return match["name"], options


def _hide(text: str) -> tuple[str, list[str]]:
    """The text with a place holder for each quoted part, and these parts without their quotes."""
    quoted: list[str] = []

    def hide(match: re.Match) -> str:
        quoted.append(match[1] if match[1] is not None else match[2])
        return f"\x00{len(quoted) - 1}\x00"

    return _QUOTED.sub(hide, text), quoted


def _show(part: str, quoted: list[str]) -> str:
    return _PLACE.sub(lambda place: f"'{quoted[int(place[1])]}'", part)
