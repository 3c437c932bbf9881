"""The subcommands of clusters, and the choice between one machine and a cluster; TensorFlow is imported where needed."""

import os
import pathlib
import sys

from absl import flags

from k4p1 import errors, gin_files, quiet_tensorflow
from k4p1.cluster import local, spec, status
from k4p1.cluster.spec import SERVER, WORKER, ClusterSpec


def train(f: flags.FlagValues) -> int:
    """`k4p1 train`."""
    return _run("train", f)


def finetune(f: flags.FlagValues) -> int:
    """`k4p1 finetune`."""
    return _run("finetune", f)


def decathlon(f: flags.FlagValues) -> int:
    """`k4p1 decathlon`."""
    return _run("decathlon", f)


def packnet(f: flags.FlagValues) -> int:
    """`k4p1 packnet`."""
    return _run("packnet", f)


def _run(name: str, f: flags.FlagValues) -> int:
    if f.model_dir is None and not f.dry_run:
        raise errors.ConfigError(f"k4p1 {name} wants --model_dir, or --dry_run")
    if f.local_cluster is not None and f.slurm is not None:
        raise errors.ConfigError("--local_cluster and --slurm exclude each other")
    if f.local_cluster is not None:
        counts = spec.parse_counts(f.local_cluster, "--local_cluster", (SERVER, WORKER))
        if os.environ.get("TF_CONFIG"):
            raise errors.ConfigError(
                "TF_CONFIG is set: this is part of another cluster; unset it, or leave out --local_cluster"
            )
        if not f.dry_run:
            resume = [] if f.resume else ["--noresume"]
            model_dir = pathlib.Path(f.model_dir).expanduser()
            gin_hash = gin_files.digest(f.gin_file, f.gin_bindings)
            flags_ = [*_gin_flags(f), *resume]
            return local.launch(name, flags_, model_dir, counts[SERVER], counts[WORKER], gin_hash)
    if f.slurm is not None and not f.dry_run:
        here = spec.from_slurm(spec.parse_counts(f.slurm, "--slurm", (SERVER,))[SERVER], f.slurm_port)
        os.environ["TF_CONFIG"] = here.as_tf_config()
        if here.job != spec.COORDINATOR:
            return _serve(here, f)
    quiet_tensorflow.import_quietly()
    from k4p1 import commands

    return commands.run(name, f)


def server(f: flags.FlagValues) -> int:
    """`k4p1 server`: a parameter server or worker, whatever `TF_CONFIG` says."""
    return _serve(_here((SERVER, WORKER)), f)


def serve_parameters(f: flags.FlagValues) -> int:
    """`k4p1 serve_parameters`."""
    return _serve(_here((SERVER,)), f)


def work(f: flags.FlagValues) -> int:
    """`k4p1 work`."""
    return _serve(_here((WORKER,)), f)


def show_status(f: flags.FlagValues, positional: list[str]) -> None:
    """`k4p1 status`."""
    for folder in positional:
        status.show(pathlib.Path(folder).expanduser())


def manifest(f: flags.FlagValues) -> None:
    """`k4p1 manifest`."""
    from k4p1.cluster import kubernetes

    quiet_tensorflow.import_quietly()
    from k4p1 import config

    config.load(f.gin_file, f.gin_bindings)
    resources = kubernetes.Resources(f.cpu, f.memory, f.gpus)
    job = kubernetes.ClusterJob(
        f.name, f.image, f.command, _gin_flags(f), f.model_dir, f.claim, f.ps, f.workers, f.port, resources
    )
    sys.stdout.write(kubernetes.manifests(job))


def _here(jobs: tuple[str, ...]) -> ClusterSpec:
    found = spec.from_environment()
    if found is None:
        raise errors.ConfigError("TF_CONFIG is not set: it must name the cluster and the role of this process")
    if found.job not in jobs:
        allowed = " or ".join(jobs)
        raise errors.ConfigError(f"TF_CONFIG makes this process {found.name} ('{found.job}'); this command wants {allowed}")
    return found


def _serve(here: ClusterSpec, f: flags.FlagValues) -> int:
    from k4p1.cluster import server as tensorflow_server

    gin_hash = gin_files.digest(f.gin_file, f.gin_bindings) if f.gin_file else ""
    tensorflow_server.serve(here, pathlib.Path(f.model_dir).expanduser(), gin_hash)
    sys.stdout.flush()
    os._exit(0)  # TensorFlow's server threads never stop


def _gin_flags(f: flags.FlagValues) -> list[str]:
    files = [f"--gin_file={file}" for file in f.gin_file]
    return files + [f"--gin_bindings={binding}" for binding in f.gin_bindings]
