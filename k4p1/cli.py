"""The command line: flags of every subcommand, and which function each calls. What they do is in `k4p1.commands`."""

import dataclasses
import importlib
import os
import sys
import warnings
from collections.abc import Callable

from absl import flags

from k4p1 import errors, quiet_tensorflow


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
        local = "Run on a cluster of processes on this machine, such as ps:1,workers:2."
        flags.DEFINE_string("local_cluster", None, local, flag_values=f)
        slurm = "Run as one task of a Slurm step: the first coordinates, the next serve, such as ps:2, all others work."
        flags.DEFINE_string("slurm", None, slurm, flag_values=f)
        flags.DEFINE_integer("slurm_port", 8888, "First port on each node, under Slurm.", flag_values=f, lower_bound=1)

    return define


def _server_flags(f: flags.FlagValues) -> None:
    same = "As given to the coordinator; compared with its run if given."
    flags.DEFINE_multi_string("gin_file", [], same, flag_values=f)
    flags.DEFINE_multi_string("gin_bindings", [], same, flag_values=f)
    _model_dir(f, "Folder of the coordinator's run, on a file system that both see.")


def _manifest_flags(f: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("gin_file", ["quickstart"], "Path in the image, or short name.", flag_values=f)
    flags.DEFINE_multi_string("gin_bindings", [], "A binding; may be repeated.", flag_values=f)
    flags.DEFINE_string("image", None, "Container image with k4p1 installed.", flag_values=f, required=True)
    flags.DEFINE_integer("ps", 1, "Parameter servers.", flag_values=f, lower_bound=1)
    flags.DEFINE_integer("workers", 2, "Workers.", flag_values=f, lower_bound=1)
    flags.DEFINE_enum("command", "train", ["train", "finetune"], "What to run.", flag_values=f)
    flags.DEFINE_string("name", "k4p1", "Of the run; names all objects.", flag_values=f)
    flags.DEFINE_string("model_dir", "/k4p1/model", "Where the shared volume is mounted.", flag_values=f)
    flags.DEFINE_string("claim", "k4p1", "PersistentVolumeClaim (ReadWriteMany) of the shared volume.", flag_values=f)
    flags.DEFINE_string("cpu", "2", "CPUs that every pod requests.", flag_values=f)
    flags.DEFINE_string("memory", "4Gi", "Memory that every pod requests.", flag_values=f)
    flags.DEFINE_integer("gpus", 0, "GPUs of each worker.", flag_values=f, lower_bound=0)
    flags.DEFINE_integer("port", 2222, "Port of every pod.", flag_values=f, lower_bound=1, upper_bound=65535)


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


def _compress_flags(f: flags.FlagValues) -> None:
    where = "Folder of a finished run; may be repeated for runs on the same backbone."
    flags.DEFINE_multi_string("model_dir", None, where, flag_values=f, required=True)
    flags.DEFINE_list("tasks", [], "Tasks to compress together, a,b,c; all if not given.", flag_values=f)
    rank = "Rank of the shared factors as a share of the channels, such as 0.5."
    flags.DEFINE_float("rank", None, rank, flag_values=f)
    budget = "In place of --rank: size of all factors, such as 200KB or 1.5MB; ranks follow the energy."
    flags.DEFINE_string("budget", None, budget, flag_values=f)
    output = "New folder for the compressed tasks; by default 'compressed' in the first --model_dir."
    flags.DEFINE_string("output_dir", None, output, flag_values=f)
    steps = "Steps a task in which its own factors learn on; 0 for none."
    flags.DEFINE_integer("finetune_steps", 0, steps, flag_values=f, lower_bound=0)
    flags.DEFINE_float("learning_rate", 1e-3, "Of these steps.", flag_values=f)


def _sparsity_flags(f: flags.FlagValues) -> None:
    _model_dir(f, "Folder of a finished run.")
    _task(f)
    flags.DEFINE_string("plot", None, "Picture to write: a .png, .svg or .pdf file.", flag_values=f)


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
      summary: one line.
      arguments: what stands behind the flags, for the help text; empty for none.
      define: adds its flags.
      function: `module:name`; by default, of the command's name in `k4p1.commands`.
    """

    summary: str
    arguments: str = ""
    define: Callable[[flags.FlagValues], None] = lambda f: None
    function: str = ""


_CLUSTER = "k4p1.cluster.commands"

COMMANDS = {
    "train": Command("Train many tasks on one backbone.", "", _run_flags("quickstart"), f"{_CLUSTER}:train"),
    "finetune": Command(
        "Train the patch of one new task on a frozen backbone.", "", _run_flags("finetune"), f"{_CLUSTER}:finetune"
    ),
    "decathlon": Command(
        "Train a patch for each of several tasks and score them together.",
        "",
        _run_flags("decathlon"),
        f"{_CLUSTER}:decathlon",
    ),
    "packnet": Command(
        "Pack tasks into one network by pruning, one after another.", "", _run_flags("packnet"), f"{_CLUSTER}:packnet"
    ),
    "evaluate": Command("Metrics of finished tasks on a split.", define=_evaluate_flags),
    "predict": Command("The most probable labels of images.", "IMAGE ...", _predict_flags),
    "export": Command("Write one SavedModel a task.", define=_export_flags),
    "compress": Command("Compress the adapters of several finished tasks together.", define=_compress_flags),
    "sparsity": Command("Show how much of every layer masks take away.", define=_sparsity_flags),
    "inspect": Command("Describe a patch file, backbone, checkpoint, model dir or export.", "PATH"),
    "status": Command("Where a running or finished run stands.", "MODEL_DIR", function=f"{_CLUSTER}:show_status"),
    "configs": Command("List the shipped gin files."),
    "server": Command("Be a parameter server or worker, as TF_CONFIG says.", "", _server_flags, f"{_CLUSTER}:server"),
    "serve_parameters": Command("Be a parameter server of TF_CONFIG.", "", _server_flags, f"{_CLUSTER}:serve_parameters"),
    "work": Command("Be a worker of TF_CONFIG.", "", _server_flags, f"{_CLUSTER}:work"),
    "manifest": Command("Print Kubernetes manifests of a cluster run.", "", _manifest_flags, f"{_CLUSTER}:manifest"),
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
    module, _, function = (command.function or f"k4p1.commands:{name}").partition(":")
    if not (debug or command.function):
        quiet_tensorflow.import_quietly()
    warnings.simplefilter("always", errors.PatchWarning)
    warnings.showwarning = _show_warning
    called = getattr(importlib.import_module(module), function)
    return (called(values, positional) if command.arguments else called(values)) or 0


def _show_warning(message, category, *where, file=None, line=None) -> None:
    """k4p1's own warnings as one line; others as Python shows them."""
    if issubclass(category, errors.PatchWarning):
        print(f"k4p1: warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, *where, line), end="", file=file or sys.stderr)


def _overview() -> str:
    lines = ["k4p1: parameter-efficient multi-task and transfer learning", "", "usage: k4p1 COMMAND [flags]", ""]
    lines += [f"  {name:<17} {command.summary}" for name, command in COMMANDS.items()]
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


def entry() -> None:
    """Runs the command line and ends the process."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "k4p1.cluster.session" in sys.modules:
        os._exit(code)  # the threads of a coordinator's connections never stop
    sys.exit(code)


if __name__ == "__main__":
    entry()
