"""The command line: flags of every subcommand, and which function each calls. What they do is in `k4p1.commands`."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable

from absl import flags

from k4p1 import errors


def _model_dir(f: flags.FlagValues, what: str) -> None:
    flags.DEFINE_string("model_dir", None, what, flag_values=f, required=True)


def _task(f: flags.FlagValues) -> None:
    flags.DEFINE_string("task", None, "One task of the run; all tasks if not given.", flag_values=f)


def _run_flags(default_file: str) -> Callable[[flags.FlagValues], None]:
    def define(f: flags.FlagValues) -> None:
        flags.DEFINE_multi_string("gin_file", [default_file], "Path or short name; see 'k4p1 configs'.", flag_values=f)
        flags.DEFINE_multi_string("gin_bindings", [], "A binding, such as 'steps = 200'; may be repeated.", flag_values=f)
        flags.DEFINE_string("model_dir", None, "Folder of the run; not needed for a dry run.", flag_values=f)
        flags.DEFINE_bool("dry_run", False, "Build everything, print parameters, take one step a task.", flag_values=f)
        flags.DEFINE_bool("resume", True, "Go on from the newest checkpoint in --model_dir.", flag_values=f)

    return define


def _evaluate_flags(f: flags.FlagValues) -> None:
    _model_dir(f, "Folder of a finished run.")
    _task(f)
    flags.DEFINE_string("split", "test", "train, validation or test.", flag_values=f)
    flags.DEFINE_string("data", None, "Other data with the same labels.", flag_values=f)


def _predict_flags(f: flags.FlagValues) -> None:
    _model_dir(f, "Folder of a finished run.")
    _task(f)
    flags.DEFINE_integer("top", 3, "How many labels a picture.", flag_values=f, lower_bound=1)


def _export_flags(f: flags.FlagValues) -> None:
    _model_dir(f, "Folder of a finished run.")
    _task(f)
    flags.DEFINE_string("export_dir", None, "Where <task>/<version>/ is written.", flag_values=f, required=True)


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
      summary: one line.
      arguments: what stands behind the flags, for the help text; empty for none.
      define: adds its flags.
      light: needs no TensorFlow.
    """

    summary: str
    arguments: str = ""
    define: Callable[[flags.FlagValues], None] = lambda f: None
    light: bool = False


COMMANDS = {
    "train": Command("Train many tasks on one backbone.", define=_run_flags("quickstart")),
    "finetune": Command("Train the patch of one new task on a frozen backbone.", define=_run_flags("finetune")),
    "evaluate": Command("Metrics of finished tasks on a split.", define=_evaluate_flags),
    "predict": Command("The most probable labels of images.", "IMAGE ...", _predict_flags),
    "export": Command("Write one SavedModel a task.", define=_export_flags),
    "inspect": Command("Describe a patch file, backbone, checkpoint, model dir or export.", "PATH"),
    "configs": Command("List the shipped gin files."),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code: 0, 1 usage or config, 2 data or artifact, 75 try again, 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    try:
        return _dispatch(argv, debug)
    except errors.K4p1Error as e:
        if debug:
            raise
        print(f"k4p1: {str(e).splitlines()[0]}", file=sys.stderr)  # gin adds lines about its calls
        return e.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("k4p1: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as e:
        if debug:
            raise
        first = (str(e).strip().splitlines() or [""])[0][:300]
        print(f"k4p1: {type(e).__name__}: {first} (--debug shows where)", file=sys.stderr)
        return 1


def _dispatch(argv: list[str], debug: bool) -> int:
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
        raise errors.ConfigError(f"k4p1 {name} wants {command.arguments}; k4p1 {name} --help shows how")
    _import_tensorflow(quiet=not debug)
    function = getattr(importlib.import_module("k4p1.commands"), name)
    function(values, positional) if command.arguments else function(values)
    return 0


def _import_tensorflow(quiet: bool) -> None:
    """Imports TensorFlow without the lines that its libraries print before any log level is read."""
    if not quiet or "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        import tensorflow as tf

        tf.config.list_physical_devices()
        tf.get_logger().setLevel("ERROR")  # advice on retracing, which is not for the user
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _overview() -> str:
    lines = ["k4p1: parameter-efficient multi-task and transfer learning", "", "usage: k4p1 COMMAND [flags]", ""]
    lines += [f"  {name:<9} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "  k4p1 COMMAND --help shows its flags; --debug after any command shows tracebacks; --version."]
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
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
