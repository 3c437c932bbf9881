"""Subcommands of clusters: `join`, `status`, `manifest`."""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from k4p1 import errors, log_lines, quiet_tensorflow
from k4p1.cli import gin_files
from k4p1.cli.command import IMPORTS, command, gin_flags, log_flag, model_dir_flag
from k4p1.files.run_record import Configuration


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
    given = gin_files.configuration(f.gin_file, f.gin_bindings) if f.gin_file else Configuration()
    with log_lines.logging(f.log_json, ("stdout", "stderr")):
        server.serve_and_exit(role, pathlib.Path(f.model_dir), given)


def _status_flags(f: flags.FlagValues) -> None:
    flags.DEFINE_bool("json", False, "Print one JSON object; docs/operations.md has its schema.", flag_values=f)


@command("Show where runs stand; the exit code tells the state.", arguments="MODEL_DIR ...", define=_status_flags)
def status(f: flags.FlagValues, folders: Sequence[str]) -> int:
    """`k4p1 status`."""
    from k4p1.runs import status as run_status

    return run_status.report([pathlib.Path(folder).expanduser() for folder in folders], f.json)


def _manifest_flags(f: flags.FlagValues) -> None:
    def text(name: str, default: str | None, what: str, **how) -> None:
        flags.DEFINE_string(name, default, what, flag_values=f, **how)

    def number(name: str, default: int, what: str, least: int = 1, most: int | None = None) -> None:
        flags.DEFINE_integer(name, default, what, flag_values=f, lower_bound=least, upper_bound=most)

    def several(name: str, what: str) -> None:
        flags.DEFINE_multi_string(name, [], what, flag_values=f)

    gin_flags(f, ["quickstart"], "Path or short name; pods get the file.", "A binding; may be repeated.")
    log_flag(f)
    text("image", None, "Container image with k4p1 installed.", required=True)
    number("ps", 1, "Number of parameter servers.")
    number("workers", 2, "Number of workers.")
    flags.DEFINE_enum("command", "train", ["train", "finetune"], "What to run.", flag_values=f)
    text("name", "k4p1", "Name of the run; prefix of all Kubernetes objects.")
    text("namespace", "", "Namespace of all objects.")
    text("model_dir", "/k4p1/model", "Where the shared volume is mounted.")
    text("claim", "k4p1", "PersistentVolumeClaim (ReadWriteMany) of the shared volume.")
    text("data_claim", "", "PersistentVolumeClaim with data, mounted read-only.")
    text("data_path", "/data", "Where; TFDS looks for its data sets there.")
    several("image_path", "A folder that the image has, with data or weights; may be repeated.")
    text("cpu", "2", "CPUs that every pod requests.")
    text("cpu_limit", "", "CPUs that a pod may use; no limit if empty.")
    text("memory", "4Gi", "Memory that every pod requests, and may use.")
    text("shm", "1Gi", "Size of /dev/shm, part of the memory.")
    text("scratch", "4Gi", "Size of /tmp.")
    number("gpus", 0, "GPUs of each worker.", least=0)
    number("port", 2222, "Port of every pod.", most=65535)
    number("user", 10001, "Number of the user and group of all processes; not 0.")
    number("keep_s", 86400, "Seconds after which the objects of a finished run are removed.", least=0)
    several("node_selector", "A label that nodes must have, key=value; may be repeated.")
    several("toleration", "A taint that pods tolerate, key=value:Effect or key:Effect; may be repeated.")
    several("pull_secret", "A secret for the image's registry; may be repeated.")
    text("kustomize", "", "Write a Kustomize base into this folder, in place of printing.")


@command("Print Kubernetes manifests of a cluster run.", define=_manifest_flags)
def manifest(f: flags.FlagValues) -> None:
    """`k4p1 manifest`."""
    from k4p1.cluster import kubernetes
    from k4p1.files import atomic

    quiet_tensorflow.import_quietly()
    from k4p1.cli import gin_bundle, gin_config
    from k4p1.cluster.worker_groups import WorkerRequest, assign

    # 1. What the pods would refuse.
    gin_config.load(f.gin_file, f.gin_bindings)
    mounted = [f.model_dir, *([f.data_path] if f.data_claim else []), *f.image_path]
    gin_bundle.check_paths(f.gin_file, f.gin_bindings, mounted)
    requests = {task.name: WorkerRequest(task.workers, task.worker_share) for task in gin_bundle.tasks_of(f.command)}
    assign(requests, f.workers, bool(gin_bundle.setting(f.command, "share_workers")))
    # 2. The gin files that they get.
    names, texts = gin_bundle.carried(f.gin_file)
    arguments = [f"--gin_file={name}" for name in names] + [f"--gin_bindings={binding}" for binding in f.gin_bindings]
    arguments += [f"--import={name}" for name in os.environ.get(IMPORTS, "").split(",") if name]
    # 3. The objects.
    job = kubernetes.ClusterJob(
        name=f.name,
        image=f.image,
        command=f.command,
        flags=arguments + (["--log_json"] if f.log_json else []),
        model_dir=f.model_dir,
        claim=f.claim,
        servers=f.ps,
        workers=f.workers,
        port=f.port,
        resources=kubernetes.Resources(f.cpu, f.memory, f.gpus, f.cpu_limit, f.shm, f.scratch),
        scheduling=kubernetes.Scheduling(f.node_selector, f.toleration, f.pull_secret),
        config=texts,
        data_claim=f.data_claim,
        data_path=f.data_path,
        namespace=f.namespace,
        user=f.user,
        keep_s=f.keep_s,
    )
    if not f.kustomize:
        sys.stdout.write(kubernetes.manifests(job))
        return
    for name, text in kubernetes.kustomize_base(job).items():
        atomic.write_text(pathlib.Path(f.kustomize).expanduser() / name, text)
    print(f"kubectl apply -k {f.kustomize}")
