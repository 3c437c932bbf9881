"""Trains prepared tasks, on one machine or on a cluster."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from k4p1.engine.bookkeeping import Evaluation, Progress, TrainingTask
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.groups import ParameterGroup, plan_groups, write_back
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.engine.pure import PureTask
from k4p1.engine.reporting import Reporter
from k4p1.engine.rules import Rules
from k4p1.engine.store import Store
from k4p1.engine.training import Trainer
from k4p1.files.status_file import StatusFile
from k4p1.patches.patched_model import PatchedModel
from k4p1.runs import unfinished
from k4p1.runs.callbacks import TaskCallbacks, by_task
from k4p1.runs.history import History
from k4p1.runs.model_dir import ModelDir
from k4p1.runs.settings import RunSettings
from k4p1.tasks.cached_features import CachedFeatures
from k4p1.tasks.prepare import PreparedTask

if TYPE_CHECKING:
    from k4p1.cluster.coordinator import Coordinator
    from k4p1.cluster.run_cluster import RunCluster
    from k4p1.cluster.step_counts import StepCounts


@dataclasses.dataclass(frozen=True)
class TrainingPlace:
    """Where training happens and what it leaves.

    Attributes:
      folder, run_hash, status: of the run.
      cluster: on which this process trains, by way of another one.
      coordinator: of the cluster, in that other process.
      refit_step: total steps of a refit; None: no refit.
    """

    folder: ModelDir | None = None
    run_hash: str = ""
    status: StatusFile | None = None
    cluster: "RunCluster | None" = None
    coordinator: "Coordinator | None" = None
    refit_step: int | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
      groups: of parameters.
      vectors: of the joint best state, by group.
      progress: best metric, skipped images.
      step_counts: on a cluster, what became of the steps.
      history: losses and validation metrics by step.
      stopped: steps of the tasks where training stopped before its target, else None.
      evaluation: what evaluated the task models; None where others were trained, such as heads on cached features.
    """

    groups: Sequence[ParameterGroup]
    vectors: Mapping[str, np.ndarray]
    progress: Progress
    step_counts: "StepCounts | None"
    history: History = dataclasses.field(default_factory=History)
    stopped: Mapping[str, int] | None = None
    evaluation: Evaluation | None = None


def train(
    prepared: Sequence[PreparedTask],
    rules: Rules,
    settings: RunSettings,
    place: TrainingPlace,
    *,
    stop_after: int | None = None,
) -> Trained:
    """Trains to the step targets, from the newest checkpoint of the folder on.

    Args:
      prepared: the tasks.
      rules: how parameters are updated.
      settings: of the run.
      place: where; a refit is on train and validation together, without selection.
      stop_after: only so many steps, for a trial.
    """
    refit, on_cluster = place.refit_step is not None, (place.cluster or place.coordinator) is not None
    split = "train+validation" if refit else "train"
    patched, inputs = _inputs(prepared, settings, cacheable=stop_after is None and not on_cluster)
    groups = plan_groups(patched, rules)
    schedule = (settings.optimizer or OptimizerConfig()).schedule
    tasks = []
    for task in prepared:
        data, definition = inputs[task.name], task.task
        selects = not refit and stop_after is None and task.splits.has("validation")
        tasks.append(
            TrainingTask(
                pure=PureTask(task.name, patched[task.name], groups),
                steps=task.steps,
                epochs=task.steps * definition.batch_size / task.splits.size(split),
                batches=functools.partial(data.training, split=split),
                loss=task.loss,
                loss_terms=task.loss.names,
                metrics=task.metrics,
                selecting=definition.metric_names[0],
                validation=functools.partial(data.sequential, "validation") if selects else None,
                calibration=task.pipeline.calibration,
                schedule=schedule if definition.schedule is None else definition.schedule,
            )
        )
    steps = {task.name: task.steps for task in prepared}
    total = sum(steps.values())
    callbacks = {} if refit or stop_after is not None else by_task(settings.callbacks, list(steps))
    per_epoch = {task.name: max(1, round(task.steps / task.epochs)) for task in tasks}
    with_callbacks = sum(per_epoch.values()) if callbacks else None
    how = {
        "seed": settings.seed,
        "evaluate_every": settings.evaluate_every or with_callbacks or max(1, total // 10),
        "checkpoint_every": settings.checkpoint_every or max(1, total // 10),
        "loss_scaled": settings.precision == "mixed_float16",
    }
    checkpoints, root = None, None
    if place.folder is not None:
        root = place.folder.root
        where = place.folder.checkpoints / "refit" if refit else place.folder.checkpoints
        checkpoints = Checkpoints(where, settings.keep_checkpoints, place.run_hash)
        if not refit and place.coordinator is None:
            unfinished.write_layout(place.folder, groups)
    history = History(None if root is None or not settings.resume else root / "metrics.jsonl")
    store = None if on_cluster else Store(groups, steps, how["loss_scaled"])
    refresh = None if store is None else lambda: write_back(groups, trainer.present_vectors())
    models = {task.name: task.patched.model for task in prepared}
    watchers = {
        name: TaskCallbacks(name, listed, models[name], steps[name], per_epoch[name], refresh)
        for name, listed in callbacks.items()
        if place.coordinator is None
    }
    if place.coordinator is not None:
        reports = place.coordinator.reporter
    else:
        quiet = settings.quiet or stop_after is not None
        reports = Reporter(steps, root, quiet, place.status, [history, *watchers.values()])
    stopped = None
    with reports as reporter:
        if any(isinstance(data, CachedFeatures) for data in inputs.values()):
            dropping = [task.name for task in prepared if task.has_inner_dropout()]
            how_dropped = (
                f", without the dropout inside the network of {', '.join(dropping)} (cache_features=False keeps it)"
            )
            reporter.message(f"only the head trains: features are computed once{how_dropped if dropping else ''}")
        if place.coordinator is not None:
            trainer = place.coordinator.trainer(tasks, groups, reporter, checkpoints, **how)
            vectors = trainer.run()
        elif place.cluster is not None:
            trainer = place.cluster.trainer(tasks, groups, reporter, checkpoints, place.run_hash, place.refit_step)
            vectors = trainer.run()
            reporter.ended(steps)
        else:
            more = {"patience": None if refit else settings.patience, "callbacks": watchers}
            trainer = Trainer(tasks, store, reporter, checkpoints, jit_compile=settings.jit_compile, **more, **how)
            vectors = trainer.run(stop_after)
            stopped = store.done() if stop_after is None and store.done() != steps else None
    same_models = all(patched[task.name] is task.patched for task in prepared)
    return Trained(
        groups,
        vectors,
        trainer.progress,
        getattr(trainer, "step_counts", None),
        history,
        stopped,
        getattr(trainer, "evaluation", None) if same_models else None,
    )


def _inputs(
    prepared: Sequence[PreparedTask], settings: RunSettings, cacheable: bool
) -> tuple[dict[str, PatchedModel], dict[str, object]]:
    """Models and batches by task: of images, or where only the head trains of features that are computed once."""
    patched, inputs = {}, {}
    for task in prepared:
        cached = cacheable and settings.cache_features is not False and task.only_head_trains()
        inputs[task.name] = (
            CachedFeatures(task.pipeline, task.patched, task.task.dropout, settings.seed) if cached else task.pipeline
        )
        patched[task.name] = inputs[task.name].patched if cached else task.patched
    return patched, inputs
