"""Where gin files are, and what they say as a hash; reads them as text, without gin."""

import hashlib
import pathlib
from collections.abc import Sequence

from k4p1 import errors

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


def digest(files: Sequence[str], bindings: Sequence[str]) -> str:
    """A hash of gin files and bindings, by which the processes of a cluster see that they were started alike.

    Files count by what they say, not by where they lie; files that they include do not count.
    """
    parts = [find(name).read_text(encoding="utf-8") for name in files]
    return hashlib.sha256("\0".join([*parts, "", *bindings]).encode()).hexdigest()
