"""The errors that k4p1 raises, each with the exit code of the command line."""

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator


class K4p1Error(Exception):
    """Base of all errors of this package; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(K4p1Error, ValueError):
    """A setting, name or option that cannot be used (exit 1)."""


class UnknownTask(ConfigError, KeyError):
    """A name that a mapping of tasks does not have (exit 1)."""

    __str__ = Exception.__str__  # a KeyError shows the repr of its text


class PatchError(ConfigError):
    """A patch that does not fit the network or another patch (exit 1)."""


class DivergedError(K4p1Error, ArithmeticError):
    """Training produced a loss or parameters that are not finite (exit 1)."""


class DataError(K4p1Error, ValueError):
    """Data that cannot be read or does not fit the task (exit 2)."""

    exit_code = 2


class ArtifactError(K4p1Error, ValueError):
    """A file of k4p1 that is damaged, or belongs to another backbone, run or version (exit 2)."""

    exit_code = 2


class StorageError(K4p1Error, OSError):
    """A file or folder that cannot be written: no space, no permission (exit 2)."""

    exit_code = 2


class Preempted(K4p1Error):
    """The run was asked to stop (SIGTERM) and saved its state; start it again to resume (exit 75)."""

    exit_code = 75


class ClusterError(K4p1Error):
    """A part of the cluster does not answer or is lost; start the run again to resume (exit 75)."""

    exit_code = 75


class ServerLostError(ClusterError):
    """A parameter server, and with it the state since the newest checkpoint, is lost (exit 75)."""


class Interrupted(K4p1Error, KeyboardInterrupt):
    """The run was interrupted (SIGINT) and saved its state (exit 130)."""

    exit_code = 130


class PatchWarning(UserWarning):
    """Something that works and is probably not what its user intended, such as a patch larger than what it adapts."""


_on_command_line = False


@contextlib.contextmanager
def on_command_line() -> Iterator[None]:
    """Within it, messages speak of flags, elsewhere of arguments."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def option(name: str) -> str:
    """What a message calls an option: `--name` on the command line, `name` in Python."""
    return f"--{name}" if _on_command_line else name


def switched_off(name: str) -> str:
    """The same of an option that should be off: `--noname`, `name=False`."""
    return f"--no{name}" if _on_command_line else f"{name}=False"


def again() -> str:
    """What starts a run once more."""
    return "the same command" if _on_command_line else "the same call"


def imported() -> str:
    """How a module with kinds or objectives of the user gets known."""
    return "--import MODULE" if _on_command_line else "import its module first"


def warn(text: str) -> None:
    """Warns in one line; the command line prints it, tests make it an error."""
    warnings.warn(text, PatchWarning, stacklevel=3)


def reason(e: BaseException) -> str:
    """What an error of another library says in one line, without the frames and colours of Keras and TensorFlow."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(e).splitlines()]
    lines = [line for line in lines if line and "Exception encountered when calling" not in line]
    if lines[:1] == ["in user code:"]:  # a traceback as text: files, each with its line of code
        frames = [number for number, line in enumerate(lines) if line.startswith('File "')]
        lines = lines[frames[-1] + 2 :] if frames else lines[1:]
    return (lines or [type(e).__name__])[0][:200]


def nearest(name: str, known: Iterable[str]) -> str:
    """The clause `did you mean 'x'? ` for the known name closest to `name`, or an empty string."""
    known = sorted(known)
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    return f"did you mean '{folded[close[0]]}'? " if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown name: what was given, the nearest known name, and all known ones."""
    known = sorted(known)
    return f"unknown {what} '{name}'; {nearest(name, known)}Known: {', '.join(known) or 'none'}"
