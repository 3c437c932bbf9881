"""The command line: finds the subcommand, reads its flags, and turns errors into one line and an exit code."""

import contextlib
import importlib
import os
import sys
import warnings

from absl import flags

from k4p1 import errors, log_lines, quiet_tensorflow
from k4p1.cli import cluster, runs, serving, studies, tasks
from k4p1.cli.command import COMMANDS, IMPORTS, Command

_GROUPS = (runs, tasks, studies, serving, cluster)
"""The modules that define subcommands, in the order of the overview."""


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code: 0, 1 usage or config, 2 data or artifact, 75 try again, 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    try:
        with errors.on_command_line():
            return _dispatch(argv)
    except errors.K4p1Error as e:
        if debug:
            raise
        _tell(str(e).splitlines()[0], argv)  # gin adds lines about its calls
        return e.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        _tell("interrupted", argv)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as e:
        if debug:
            raise
        first = (str(e).strip().splitlines() or [""])[0][:300]
        _tell(f"{type(e).__name__}: {first} (--debug shows where)", argv)
        return 1


def _tell(error: str, argv: list[str]) -> None:
    """One line, as a JSON object where the other lines are; where it cannot be written, the exit code tells."""
    with (
        contextlib.suppress(OSError),
        log_lines.logging(as_json=True) if "--log_json" in argv else contextlib.nullcontext(),
    ):
        print(f"k4p1: {error}", file=sys.stderr, flush=True)


def _dispatch(argv: list[str]) -> int:
    argv = _import_modules(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 1
    if argv[0] == "--version":
        import k4p1

        print(f"k4p1 {k4p1.__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise errors.ConfigError(errors.unknown("command", name, COMMANDS))
    command = COMMANDS[name]
    values = flags.FlagValues()
    command.define(values)
    if {"-h", "--help"} & set(rest):
        print(_help(name, command, values))
        return 0
    try:
        positional = values([f"k4p1 {name}", *rest])[1:]
    except flags.Error as e:
        raise errors.ConfigError(" ".join(str(e).replace("flags ", "flag ").split())) from e
    if positional and not command.arguments:
        raise errors.ConfigError(f"k4p1 {name} takes no argument '{positional[0]}'; k4p1 {name} --help shows its flags")
    if command.arguments and not positional:
        raise errors.ConfigError(f"k4p1 {name} needs {command.arguments}; k4p1 {name} --help shows how")
    warnings.simplefilter("always", errors.PatchWarning)
    warnings.showwarning = _show_warning
    return (command.function(values, positional) if command.arguments else command.function(values)) or 0


def _import_modules(argv: list[str]) -> list[str]:
    """Imports what `--import MODULE` names (patch kinds, objectives of the user); returns the other arguments.

    Processes that this one starts find the names in the environment.
    """
    rest, modules = [], [name for name in os.environ.get(IMPORTS, "").split(",") if name]
    remaining = iter(argv)
    for argument in remaining:
        if argument == "--import":
            modules.append(next(remaining, ""))
        elif argument.startswith("--import="):
            modules.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if modules:
        sys.path.insert(0, os.getcwd())
        quiet_tensorflow.import_quietly()
        os.environ[IMPORTS] = ",".join(dict.fromkeys(modules))
    for module in modules:
        try:
            importlib.import_module(module)
        except errors.K4p1Error:
            raise
        except (ImportError, ValueError) as e:
            raise errors.ConfigError(
                f"--import {module}: {e}; expected the name of a Python module, here or installed"
            ) from e
    return rest


def _show_warning(message, category, *where, file=None, line=None) -> None:
    """k4p1's own warnings as one line; others as Python shows them."""
    if issubclass(category, errors.PatchWarning):
        print(f"k4p1: warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, *where, line), end="", file=file or sys.stderr)


def _overview() -> str:
    lines = ["k4p1: parameter-efficient multi-task and transfer learning", "", "usage: k4p1 COMMAND [flags]", ""]
    for group in _GROUPS:
        listed = {name: command for name, command in COMMANDS.items() if command.function.__module__ == group.__name__}
        lines += [*(f"  {name:<13} {command.summary}" for name, command in listed.items()), ""]
    lines += ["  k4p1 COMMAND --help shows its flags; --debug after any command shows tracebacks;"]
    lines += ["  --import MODULE loads patch kinds and objectives of your own; --version."]
    lines += ["  First: k4p1 train --gin_file quickstart --model_dir /tmp/quickstart"]
    return "\n".join(lines)


def _help(name: str, command: Command, values: flags.FlagValues) -> str:
    lines = [f"usage: k4p1 {name} [flags] {command.arguments}".rstrip(), "", command.summary, ""]
    for key in sorted(values):
        flag = values[key]
        if flag.name != key:
            continue
        default = "" if flag.default in (None, [], False) else f" (default: {flag.default_as_str})"
        shown = f"--[no]{key}" if flag.boolean else f"--{key}"
        lines.append(f"  {shown:<15} {flag.help.splitlines()[0].rstrip(';')}{default}")
    lines.append(f"  {'--debug':<15} Show a traceback instead of one line.")
    lines.append(f"  {'--import':<15} Import a Python module first, such as one with objectives of your own.")
    return "\n".join(lines)


def entry() -> None:
    """Runs the command line and ends the process."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "k4p1.cluster.supervisor" in sys.modules:
        os._exit(code)  # an evaluation that nobody waits for may still be running
    sys.exit(code)


if __name__ == "__main__":
    entry()
