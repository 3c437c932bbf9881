"""Subcommands of clusters: `join`, `status`, `manifest`."""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from k4p1 import errors, log_lines, quiet_tensorflow
from k4p1.cli import gin_files
from k4p1.cli.command import IMPORTS, command, gin_arguments, gin_flags, log_flag, model_dir_flag


def _join_flags(f: flags.FlagValues) -> None:
    same = "Same as the coordinator's; checked against its run if given."
    gin_flags(f, [], same, same)
    model_dir_flag(f, "Folder of the coordinator's run, on a shared file system.")
    log_flag(f)


@command("Join a cluster as the parameter server or worker named in TF_CONFIG.", define=_join_flags)
def join(f: flags.FlagValues) -> None:
    """`k4p1 join`."""
    from k4p1.cluster import server
    from k4p1.cluster.place import where_to_run
    from k4p1.cluster.spec import COORDINATOR

    role = where_to_run().role
    if role is None:
        raise errors.ConfigError("TF_CONFIG is not set: it must name the cluster and the role of this process")
    if role.job == COORDINATOR:
        raise errors.ConfigError(f"TF_CONFIG makes this process the {role.name}; start it with 'k4p1 train', or 'finetune'")
    gin_hash = gin_files.digest(f.gin_file, f.gin_bindings) if f.gin_file else ""
    with log_lines.logging(f.log_json, ("stdout", "stderr")):
        server.serve_and_exit(role, pathlib.Path(f.model_dir), gin_hash)


def _status_flags(f: flags.FlagValues) -> None:
    flags.DEFINE_bool("json", False, "Print one JSON object; docs/operations.md has its schema.", flag_values=f)


@command("Show where runs stand; the exit code tells the state.", arguments="MODEL_DIR ...", define=_status_flags)
def status(f: flags.FlagValues, folders: Sequence[str]) -> int:
    """`k4p1 status`."""
    from k4p1.runs import status as run_status

    return run_status.report([pathlib.Path(folder).expanduser() for folder in folders], f.json)


def _manifest_flags(f: flags.FlagValues) -> None:
    gin_flags(f, ["quickstart"], "Path in the image, or short name.", "A binding; may be repeated.")
    flags.DEFINE_string("image", None, "Container image with k4p1 installed.", flag_values=f, required=True)
    flags.DEFINE_integer("ps", 1, "Number of parameter servers.", flag_values=f, lower_bound=1)
    flags.DEFINE_integer("workers", 2, "Number of workers.", flag_values=f, lower_bound=1)
    flags.DEFINE_enum("command", "train", ["train", "finetune"], "What to run.", flag_values=f)
    flags.DEFINE_string("name", "k4p1", "Name of the run; prefix of all Kubernetes objects.", flag_values=f)
    flags.DEFINE_string("model_dir", "/k4p1/model", "Where the shared volume is mounted.", flag_values=f)
    flags.DEFINE_string("claim", "k4p1", "PersistentVolumeClaim (ReadWriteMany) of the shared volume.", flag_values=f)
    flags.DEFINE_string("cpu", "2", "CPUs that every pod requests.", flag_values=f)
    flags.DEFINE_string("memory", "4Gi", "Memory that every pod requests.", flag_values=f)
    flags.DEFINE_integer("gpus", 0, "GPUs of each worker.", flag_values=f, lower_bound=0)
    flags.DEFINE_integer("port", 2222, "Port of every pod.", flag_values=f, lower_bound=1, upper_bound=65535)


@command("Print Kubernetes manifests of a cluster run.", define=_manifest_flags)
def manifest(f: flags.FlagValues) -> None:
    """`k4p1 manifest`."""
    from k4p1.cluster import kubernetes

    quiet_tensorflow.import_quietly()
    from k4p1.cli import gin_config

    gin_config.load(f.gin_file, f.gin_bindings)
    resources = kubernetes.Resources(f.cpu, f.memory, f.gpus)
    imports = [f"--import={name}" for name in os.environ.get(IMPORTS, "").split(",") if name]
    job = kubernetes.ClusterJob(
        f.name, f.image, f.command, [*gin_arguments(f), *imports], f.model_dir, f.claim, f.ps, f.workers, f.port, resources
    )
    sys.stdout.write(kubernetes.manifests(job))
