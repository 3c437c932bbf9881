"""Subcommands that train: `train`, `finetune`, `decathlon`, `packnet`, `nettailor`."""

import os
import pathlib
import shlex
import sys
from collections.abc import Mapping

from absl import flags

from k4p1 import errors, log_lines, quiet_tensorflow
from k4p1.cli import gin_files
from k4p1.cli.command import Define, command, gin_arguments, gin_flags, log_flag, offline_flag, stay_offline

_COMMAND_LINE = "K4P1_COMMAND_LINE"
"""Environment variable of a coordinator that another process starts: what its user typed."""


def _run_flags(default_file: str, clusters: bool = True) -> Define:
    def define(f: flags.FlagValues) -> None:
        binding = "A binding, such as 'steps = 200'; may be repeated."
        gin_flags(f, [default_file], "Path or short name; see 'k4p1 configs'.", binding)
        flags.DEFINE_string("model_dir", None, "Folder of the run; not needed for a dry run.", flag_values=f)
        dry_run = "Build everything, print parameters and update rules, take one step per task, write nothing."
        flags.DEFINE_bool("dry_run", False, dry_run, flag_values=f)
        flags.DEFINE_bool("resume", True, "Resume from the newest checkpoint in --model_dir.", flag_values=f)
        log_flag(f)
        offline_flag(f)
        about_port = "Serve metrics for Prometheus at this port, /metrics, on all interfaces."
        flags.DEFINE_integer("metrics_port", None, about_port, flag_values=f, lower_bound=1, upper_bound=65535)
        if not clusters:
            return
        local = "Run on a cluster of processes on this machine, such as ps:1,workers:2."
        flags.DEFINE_string("local_cluster", None, local, flag_values=f)
        slurm = (
            "Run as one task of a Slurm step: rank 0 coordinates, the next ones are servers, such as ps:2, the rest work."
        )
        flags.DEFINE_string("slurm", None, slurm, flag_values=f)
        flags.DEFINE_integer("slurm_port", 8888, "First port on each node, under Slurm.", flag_values=f, lower_bound=1)

    return define


@command("Train many tasks on one backbone.", define=_run_flags("quickstart"))
def train(f: flags.FlagValues) -> int:
    """`k4p1 train`."""
    return _run("train", f)


@command("Train the patch of one new task on a frozen backbone.", define=_run_flags("finetune"))
def finetune(f: flags.FlagValues) -> int:
    """`k4p1 finetune`."""
    return _run("finetune", f)


@command("Train a patch for each of several tasks and score them together.", define=_run_flags("decathlon"))
def decathlon(f: flags.FlagValues) -> int:
    """`k4p1 decathlon`."""
    return _run("decathlon", f)


@command("Pack tasks into one network by pruning, one after another.", define=_run_flags("packnet", clusters=False))
def packnet(f: flags.FlagValues) -> int:
    """`k4p1 packnet`."""
    return _run("packnet", f)


@command("Tailor the architecture of a task: teacher, student, pruning.", define=_run_flags("nettailor", clusters=False))
def nettailor(f: flags.FlagValues) -> int:
    """`k4p1 nettailor`."""
    return _run("nettailor", f)


def _run(name: str, f: flags.FlagValues) -> int:
    """Runs the gin-configured function `name` where flags and environment say; what it prints becomes log lines."""
    stay_offline(f)
    with log_lines.logging(f.log_json):
        return _run_somewhere(name, f)


def _run_somewhere(name: str, f: flags.FlagValues) -> int:
    from k4p1.cluster.place import Place, where_to_run
    from k4p1.cluster.spec import COORDINATOR

    if f.model_dir is None and not f.dry_run:
        raise errors.ConfigError(f"k4p1 {name} needs --model_dir, or --dry_run")
    flag = {name: f[name].value for name in ("local_cluster", "slurm", "slurm_port") if name in f}
    where = where_to_run(**{**flag, "slurm": None} if f.dry_run else flag)
    if f.dry_run:
        where = Place()
    if where.launch is not None:
        from k4p1.cluster import local

        arguments = [*gin_arguments(f), *([] if f.resume else ["--noresume"])]
        arguments += [] if f.metrics_port is None else [f"--metrics_port={f.metrics_port}"]
        model_dir = pathlib.Path(f.model_dir).expanduser()
        os.environ[_COMMAND_LINE] = _command_line()
        try:
            return local.launch(
                name, arguments, model_dir, *where.launch, gin_files.configuration(f.gin_file, f.gin_bindings)
            )
        finally:
            del os.environ[_COMMAND_LINE]
    if flag.get("slurm") is not None and where.role is not None and where.role.job != COORDINATOR:
        from k4p1.cluster import server

        server.serve_and_exit(where.role, pathlib.Path(f.model_dir), gin_files.configuration(f.gin_file, f.gin_bindings))
    return _run_here(name, f)


def _command_line() -> str:
    return shlex.join(["k4p1", *sys.argv[1:]])


def _run_here(name: str, f: flags.FlagValues) -> int:
    """In this process, alone or as coordinator of a cluster."""
    from k4p1.cluster.parent import end_with_parent

    quiet_tensorflow.import_quietly()
    from k4p1.cli import gin_config

    end_with_parent(gently=True)
    text = gin_config.load(f.gin_file, f.gin_bindings)

    def texts() -> Mapping[str, str]:
        for binding in gin_config.unused():
            print(f"k4p1: warning: unused binding '{binding}'", file=sys.stderr)
        line = os.environ.get(_COMMAND_LINE) or _command_line()
        return {"config.gin": text, "operative_config.gin": gin_config.operative(), "command.txt": line + "\n"}

    configuration = gin_files.configuration(f.gin_file, f.gin_bindings)
    function = gin_config.CONFIGURABLES[name]
    try:
        function(
            model_dir=f.model_dir,
            dry_run=f.dry_run,
            resume=f.resume,
            metrics_port=f.metrics_port,
            configuration=configuration,
            texts=texts,
        )
    except TypeError as e:
        missing = str(e).splitlines()[0]
        if "argument" not in missing:
            raise
        raise errors.ConfigError(f"{missing}; is {', '.join(f.gin_file)} a file for 'k4p1 {name}'?") from e
    return 0
