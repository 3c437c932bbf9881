"""The small language of specs: `name(option=value,option=value)+name`, for patches and augmentations."""

import re
from collections.abc import Iterator

_TERM = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<options>[^()]*)\))?\s*")
_OPTION = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?P<value>[^\s=,()+]+)\s*")


def parse(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The (name, options as text) pairs of a spec, in order.

    Raises:
      ValueError: bad syntax; one line that shows the part that cannot be read.
    """
    for term in text.split("+"):
        match = _TERM.fullmatch(term)
        if not match:
            raise ValueError(f"cannot read {term.strip()!r} in {text!r}; write name(option=value)+name")
        listed = (match["options"] or "").strip()
        options: dict[str, str] = {}
        for option in listed.split(",") if listed else ():
            parsed = _OPTION.fullmatch(option)
            if not parsed:
                raise ValueError(f"cannot read option {option.strip()!r} in {text!r}; write option=value")
            if parsed["name"] in options:
                raise ValueError(f"option '{parsed['name']}' is given twice in {text!r}")
            options[parsed["name"]] = parsed["value"]
        yield match["name"], options
