"""What a subcommand is: its name, one line of help, its flags and its function, all in one place."""

import dataclasses
from collections.abc import Callable

from absl import flags

from k4p1 import offline

Define = Callable[[flags.FlagValues], None]


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
      summary: one line.
      arguments: what follows the flags, for the help text; empty for none.
      define: adds its flags.
      function: of (flags), or of (flags, arguments); returns an exit code, or None for 0.
    """

    summary: str
    arguments: str
    define: Define
    function: Callable[..., int | None]


IMPORTS = "K4P1_IMPORT"
"""Environment variable: modules that `--import` named, for the processes that a command starts."""

COMMANDS: dict[str, Command] = {}
"""The subcommands by name, in the order of the overview."""


def command(summary: str, *, arguments: str = "", define: Define = lambda f: None) -> Callable:
    """Makes the decorated function a subcommand of its name. Heavy modules are imported inside such functions."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        COMMANDS[function.__name__] = Command(summary, arguments, define, function)
        return function

    return register


def model_dir_flag(f: flags.FlagValues, what: str = "Folder of a finished run.") -> None:
    """`--model_dir`, required."""
    flags.DEFINE_string("model_dir", None, what, flag_values=f, required=True)


def task_flag(f: flags.FlagValues) -> None:
    """`--task`."""
    flags.DEFINE_string("task", None, "One task of the run; all tasks if not given.", flag_values=f)


def gin_flags(f: flags.FlagValues, files: list[str], about_file: str, about_bindings: str) -> None:
    """`--gin_file` and `--gin_bindings`; a file on the command line replaces the default one."""
    flags.DEFINE_multi_string("gin_file", files, about_file, flag_values=f)
    flags.DEFINE_multi_string("gin_bindings", [], about_bindings, flag_values=f)


def offline_flag(f: flags.FlagValues) -> None:
    """`--offline`."""
    flags.DEFINE_bool("offline", False, "Never download data: fail at once, and say what to prepare.", flag_values=f)


def stay_offline(f: flags.FlagValues) -> None:
    """Does what `--offline` says, for this process and those that it starts."""
    if f.offline:
        offline.stay_offline()


def log_flag(f: flags.FlagValues) -> None:
    """`--log_json`."""
    what = "Log lines as JSON objects (time, level, text; event, tasks of progress)."
    flags.DEFINE_bool("log_json", False, what, flag_values=f)


def gin_arguments(f: flags.FlagValues) -> list[str]:
    """The flags that all processes of a run share, as arguments for another one: gin's, and how it logs."""
    files = [f"--gin_file={file}" for file in f.gin_file]
    log = ["--log_json"] if "log_json" in f and f.log_json else []
    return [*files, *(f"--gin_bindings={binding}" for binding in f.gin_bindings), *log]
