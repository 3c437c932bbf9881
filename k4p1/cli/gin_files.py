"""Where gin files are, and what they say as a hash; reads them as text, without gin."""

import hashlib
import pathlib
import re
from collections.abc import Sequence

from k4p1 import errors
from k4p1.files.run_record import Configuration

_SETTING = re.compile(r"([\w./]+)\s*=\s*(.*)")
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def folder() -> pathlib.Path:
    """Where the shipped gin files are: inside an installed package, or `gin/` of a source checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "gin"


def shipped() -> dict[str, str]:
    """The shipped gin files by short name, each with the first line of its comment."""
    return {
        path.stem: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in sorted(folder().glob("*.gin"))
    }


def find(name: str) -> pathlib.Path:
    """The gin file of a path or a short name.

    Raises:
      ConfigError: no such file; the nearest short name is shown.
    """
    for candidate in (pathlib.Path(name).expanduser(), folder() / name, folder() / f"{name}.gin"):
        if candidate.is_file():
            return candidate
    raise errors.ConfigError(errors.unknown("gin file", name, shipped()))


def configuration(files: Sequence[str], bindings: Sequence[str]) -> Configuration:
    """What gin files and bindings say, by which the processes of a cluster see that they were started alike.

    Files count by what they say, not by where they lie; files that they include do not count.
    """
    parts = [find(name).read_text(encoding="utf-8") for name in files]
    digest = hashlib.sha256("\0".join([*parts, "", *bindings]).encode()).hexdigest()
    return Configuration(digest, _settings("\n".join([*parts, *bindings])))


def _settings(text: str) -> dict[str, str]:
    """Values by name, the last ones; a value may go over several lines, up to the bracket that closes it."""
    found: dict[str, str] = {}
    name, value = "", ""
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if name:
            value = f"{value} {line}".strip()
        elif match := _SETTING.fullmatch(line):
            name, value = match[1], match[2]
        if name and all(value.count(a) <= value.count(b) for a, b in ("()", "[]", "{}")):
            found[name], name = value, ""
    return found
