"""One run: tasks on one backbone, from their definitions to patch files. Multi-task and transfer learning are both this."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from k4p1 import artifact, errors, status_file
from k4p1.backbones.backbone import Backbone
from k4p1.cluster import spec as cluster_spec
from k4p1.engine.bookkeeping import TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import ParameterGroup, plan_groups, write_back
from k4p1.engine.optimization import Optimization
from k4p1.engine.pure import PureTask
from k4p1.engine.reporting import Reporter
from k4p1.engine.store import Store
from k4p1.engine.training import Trainer
from k4p1.experiments import tables
from k4p1.experiments.finishing import finish, recalibrate
from k4p1.experiments.model_dir import ModelDir, plain_task
from k4p1.experiments.run_lock import check_usable, run_lock
from k4p1.experiments.settings import RunSettings
from k4p1.experiments.starting import read_starts, read_teachers
from k4p1.patches.apply import head_is_shared
from k4p1.patches.patched_model import PatchedModel
from k4p1.status_file import StatusFile
from k4p1.tasks.cached_features import CachedFeatures
from k4p1.tasks.prepare import PreparedTask, prepare_tasks
from k4p1.tasks.task import Task

if TYPE_CHECKING:
    from k4p1.cluster.connection import Cluster
    from k4p1.cluster.trainer import ClusterTrainer


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run leaves in memory.

    Attributes:
      summary: the content of `result.json`.
      models: the task models by name, trained.
      backbone: trained with them, or as it was.
    """

    summary: Mapping[str, Any]
    models: Mapping[str, PatchedModel]
    backbone: Backbone


def run(
    backbone: Backbone | Callable[[], Backbone], tasks: Sequence[Task], *, shared_trained: bool, settings: RunSettings
) -> RunResult:
    """Trains tasks on one backbone and writes what they learned.

    Args:
      backbone: or a function that makes it, called after precision and seed are set.
      tasks: with distinct names.
      shared_trained: True: the shared weights learn from all tasks (K4P1, section 2, "Multitask learning"). False: they are
        frozen ("Transfer learning").
      settings: see `RunSettings`.
    """
    if settings.dry_run:
        return _dry_run(backbone, tasks, shared_trained, settings)
    folder = ModelDir(settings.model_dir) if settings.model_dir is not None else None
    spec = cluster_spec.from_environment()
    status = StatusFile()
    with contextlib.ExitStack() as held:

        def hold() -> None:
            """The folder is this run's from here on."""
            if folder is not None:
                check_usable(folder.root)
                held.enter_context(run_lock(folder.root))

        try:
            # 1. The cluster, if this process coordinates one: its connection comes before the first variable.
            cluster = None
            if spec is not None:
                goes_on = folder is not None and settings.resume
                before = status_file.read(folder.root).get("tasks", {}) if goes_on else {}
                known_steps = {task: values.get("done", 0) for task, values in before.items()}
                cluster = _connect(hold, spec, backbone, tasks, folder, settings, known_steps)
            result = _run(backbone, tasks, shared_trained, settings, folder, status, cluster, hold)
        except (errors.Preempted, errors.Interrupted, errors.ClusterError) as e:
            status.end(status_file.STOPPED, str(e))
            raise
        except errors.K4p1Error as e:
            status.end(status_file.FAILED, str(e))
            raise
        except tf.errors.OpError as e:
            if spec is None:
                raise
            status.end(status_file.STOPPED, str(e))
            raise errors.ServerLostError(f"the cluster failed ({str(e).splitlines()[0][:200]})") from e
        except BaseException as e:
            status.end(status_file.FAILED, f"{type(e).__name__}: {e}")
            raise
        status.end(status_file.FINISHED)
        return result


def _run(
    backbone: Backbone | Callable[[], Backbone],
    tasks: Sequence[Task],
    shared_trained: bool,
    settings: RunSettings,
    folder: ModelDir | None,
    status: StatusFile,
    cluster: "Cluster | None",
    hold: Callable[[], None],
) -> RunResult:
    # 2. Precision and seed come before the first variable; data and models.
    backbone, prepared = _prepare(backbone, tasks, shared_trained, settings)
    optimization = settings.optimization or Optimization()
    texts = settings.texts()
    # 3. The folder, if it is this run's.
    run_hash = ""
    if folder is not None:
        if cluster is None:
            hold()
        description = _describe(backbone, prepared, optimization, shared_trained, settings)
        run_hash = folder.begin(description, texts, settings.resume)
        status.begin(folder.root)
        for task in prepared:
            folder.write_task(task.task, task.labels, settings.seed)
    # 4. Training; the joint best state of all tasks.
    place = _Place(folder, run_hash, status, cluster)
    trainer, groups, vectors = _train(prepared, optimization, settings, place)
    if settings.refit:
        best = max(trainer.progress.best_step, 1)
        total = sum(task.steps for task in prepared)
        prepared = [dataclasses.replace(t, steps=max(1, round(t.steps * best / total))) for t in prepared]
        _, groups, vectors = _train(prepared, optimization, settings, place, split="train+validation")
    # 5. After the last shared update every task meets the same backbone: statistics, evaluation and files, once.
    write_back(groups, vectors)
    recalibrate(prepared, settings.recalibration_batches)
    evaluated = ("test",) if settings.refit else ("validation", "test")  # a refit has trained on validation images
    result = finish(backbone, prepared, folder, shared_trained, trainer.progress.skipped, evaluated)
    if accounts := getattr(trainer, "accounts", None):
        result["cluster"] = accounts.as_json()
    if folder is not None:
        artifact.write_json(folder.result, result)
    if not settings.quiet:
        tables.print_result(result)
    return RunResult(result, {task.name: task.patched for task in prepared}, backbone)


def _prepare(
    backbone: Backbone | Callable[[], Backbone], tasks: Sequence[Task], shared_trained: bool, settings: RunSettings
) -> tuple[Backbone, list[PreparedTask]]:
    keras.config.set_dtype_policy(settings.precision)
    keras.utils.set_random_seed(settings.seed)
    backbone = backbone() if callable(backbone) else backbone
    prepared = prepare_tasks(
        backbone,
        tasks,
        shared_trained=shared_trained,
        steps=settings.steps,
        seed=settings.seed,
        starts=read_starts(tasks, backbone),
        teachers=read_teachers(tasks),
    )
    if not shared_trained:
        _warn_of_random_heads(prepared)
    return backbone, prepared


def _dry_run(backbone, tasks: Sequence[Task], shared_trained: bool, settings: RunSettings) -> RunResult:
    backbone, prepared = _prepare(backbone, tasks, shared_trained, settings)
    settings.texts()
    tables.print_parameters(prepared)
    place = _Place(None, "", StatusFile(), None)
    _train(prepared, settings.optimization or Optimization(), settings, place, stop_after=len(prepared))
    print("dry run: every task took one step; nothing was written")
    return RunResult({}, {task.name: task.patched for task in prepared}, backbone)


def _connect(
    hold: Callable[[], None],
    spec: cluster_spec.ClusterSpec,
    backbone: Backbone | Callable[[], Backbone],
    tasks: Sequence[Task],
    folder: ModelDir | None,
    settings: RunSettings,
    known_steps: Mapping[str, int],
) -> "Cluster":
    from k4p1.cluster.connection import Cluster

    if isinstance(backbone, Backbone):
        raise errors.ConfigError("on a cluster, give a function that makes the backbone: variables made before are lost")
    if any(task.teacher for task in tasks):
        raise errors.ConfigError("a task with a teacher trains on one machine: workers do not hold the teacher's weights")
    if settings.jit_compile:
        raise errors.ConfigError("jit_compile=True: XLA cannot compile steps whose vectors are on parameter servers")
    Cluster.check(spec, {task.name: (task.workers, task.worker_share) for task in tasks}, settings)
    hold()
    return Cluster.connect(
        spec,
        {task.name: (task.workers, task.worker_share) for task in tasks},
        settings,
        known_steps,
        None if folder is None else folder.root,
        settings.gin_hash,
    )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where training happens and what it leaves: the folder and the hash of the run, its status, its cluster."""

    folder: ModelDir | None
    run_hash: str
    status: StatusFile
    cluster: "Cluster | None"


def _train(
    prepared: Sequence[PreparedTask],
    optimization: Optimization,
    settings: RunSettings,
    place: _Place,
    split: str = "train",
    stop_after: int | None = None,
) -> tuple["Trainer | ClusterTrainer", list[ParameterGroup], dict[str, np.ndarray]]:
    """Trains on a split; returns the trainer, the groups, and the best vectors."""
    refit = split != "train"
    folder, cluster = place.folder, place.cluster
    cacheable = settings.cache_features is not False and stop_after is None and cluster is None
    patched, inputs = {}, {}
    for task in prepared:
        cached = cacheable and task.only_head_trains()
        inputs[task.name] = (
            CachedFeatures(task.pipeline, task.patched, task.task.dropout, settings.seed) if cached else task.pipeline
        )
        patched[task.name] = inputs[task.name].patched if cached else task.patched
    groups = plan_groups(patched, optimization, {task.name: task.splits.size(split) for task in prepared})
    training_tasks = []
    for task in prepared:
        data = inputs[task.name]
        own = {"learning_rate": task.task.learning_rate, "schedule": task.task.schedule}
        training_tasks.append(
            TrainingTask(
                pure=PureTask(task.name, patched[task.name], groups),
                steps=task.steps,
                epochs=task.steps * task.task.batch_size / task.splits.size(split),
                batches=functools.partial(data.training, split=split),
                loss=task.loss,
                metrics=task.metrics,
                selecting=task.task.metrics[0],
                validation=None
                if refit or stop_after or not task.splits.has("validation")
                else functools.partial(data.sequential, "validation"),
                calibration=task.pipeline.calibration,
                optimization=dataclasses.replace(optimization, **{k: v for k, v in own.items() if v is not None}),
            )
        )
    steps = {task.name: task.steps for task in prepared}
    total = sum(steps.values())
    loss_scaled = settings.precision == "mixed_float16"
    checkpoints = None
    if folder is not None:
        where = folder.checkpoints / "refit" if refit else folder.checkpoints
        checkpoints = Checkpoints(where, settings.keep_checkpoints, place.run_hash)
    quiet = settings.quiet or stop_after is not None
    how = {
        "seed": settings.seed,
        "evaluate_every": settings.evaluate_every or max(1, total // 10),
        "checkpoint_every": settings.checkpoint_every or max(1, total // 10),
        "loss_scaled": loss_scaled,
    }
    with Reporter(steps, folder.root if folder else None, quiet, place.status) as reporter:
        if any(isinstance(data, CachedFeatures) for data in inputs.values()):
            reporter.message("only the head trains: features are computed once")
        if cluster is not None:
            known_steps = {} if refit else cluster.known_steps
            trainer = cluster.trainer(
                training_tasks, groups, optimization, reporter, checkpoints, known_steps=known_steps, **how
            )
            return trainer, groups, trainer.run()
        store = Store(groups, optimization, steps, loss_scaled)
        trainer = Trainer(training_tasks, store, reporter, checkpoints, jit_compile=settings.jit_compile, **how)
        return trainer, groups, trainer.run(stop_after)


def _warn_of_random_heads(prepared: Sequence[PreparedTask]) -> None:
    for task in prepared:
        if head_is_shared(task.patched.spec):
            print(
                f"task '{task.name}': '{task.patched.spec}' does not own its head, and shared weights are frozen: the head "
                "stays at its random values (K4P1's \"random last\"); add '+head' to train it"
            )


def _describe(backbone, prepared, optimization, shared_trained, settings: RunSettings) -> dict[str, Any]:
    """Everything that decides what the run computes, as plain values."""
    how = ("seed", "recalibration_batches", "precision", "cache_features", "refit", "jit_compile", "evaluate_every")
    return {
        "backbone": {"name": backbone.name, "config": _plain(backbone.config), "fingerprint": backbone.fingerprint()},
        "tasks": [
            {**_computed(t.task), "schedule": repr(t.task.schedule), "steps": t.steps, "labels": list(t.labels)}
            for t in prepared
        ],
        "optimization": repr(optimization),
        "shared_trained": shared_trained,
        **{name: getattr(settings, name) for name in how},
    }


def _computed(task: Task) -> dict[str, Any]:
    """The plain fields of a task without those that say who computes it; of files, their content."""
    plain = {name: value for name, value in plain_task(task).items() if name not in ("workers", "worker_share")}
    files = {name: artifact.read_header(plain[name])["content_hash"] for name in ("start", "teacher") if plain[name]}
    return {**plain, **files}


def _plain(config: Mapping[str, Any]) -> Any:
    return {key: value if key != "keras_model" else "given" for key, value in config.items()}
