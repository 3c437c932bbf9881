"""One run: tasks on one backbone, from their definitions to patch files. Multi-task and transfer learning are both this."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras

from k4p1 import errors
from k4p1.backbones import BackboneLike, as_backbone
from k4p1.backbones.backbone import UNTOUCHED, Backbone
from k4p1.cluster.place import where_to_run
from k4p1.cluster.spec import ClusterSpec
from k4p1.engine.groups import freeze, write_back
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.engine.rules import Rules
from k4p1.engine.stop_signal import ends_on_sigterm
from k4p1.files import atomic, status_file
from k4p1.files.run_lock import RunLock, check_usable, run_lock
from k4p1.files.status_file import StatusFile
from k4p1.patches.patched_layer import FIXED
from k4p1.patches.patched_model import SHARED, PatchedModel
from k4p1.runs import backbone_normalisation, callbacks, linear_probe, tables, unfinished
from k4p1.runs.description import describe
from k4p1.runs.finalize import finalize, recalibrate
from k4p1.runs.metrics_server import metrics_server
from k4p1.runs.model_dir import ModelDir
from k4p1.runs.preflight import preflight
from k4p1.runs.settings import RunSettings
from k4p1.runs.training import TrainingPlace, train
from k4p1.runs.warm_start import read_teachers, read_warm_starts
from k4p1.tasks.prepare import PreparedTask, prepare_tasks
from k4p1.tasks.task import Task

if TYPE_CHECKING:
    from k4p1.cluster.coordinator import Coordinator, Order, Training
    from k4p1.cluster.run_cluster import RunCluster


@dataclasses.dataclass(frozen=True, repr=False)
class RunResult:
    """What a run leaves in memory.

    Attributes:
      summary: the content of `result.json`.
      models: the task models by name, trained.
      backbone: trained with them, or as it was.
      history: by task, `step`, `loss`, `validation_accuracy`, ..., lists of one length, a value per evaluation.
    """

    summary: Mapping[str, Any]
    models: Mapping[str, PatchedModel]
    backbone: Backbone
    history: Mapping[str, Mapping[str, list[float | None]]] = dataclasses.field(default_factory=dict)

    def table(self) -> str:
        """The metrics, parameters and bytes of every task, as text."""
        return tables.result_text(self.summary)

    def __repr__(self) -> str:
        return self.table() if self.summary else f"RunResult(tasks={list(self.models)}, a dry run)"

    def _repr_html_(self) -> str:
        return tables.result_html(self.summary) if self.summary else f"<p>{self!r}</p>"


def run(backbone: BackboneLike, tasks: Sequence[Task], *, shared_trained: bool, settings: RunSettings) -> RunResult:
    """Trains tasks on one backbone and writes what they learned.

    Args:
      backbone: see `k4p1.backbones.as_backbone`; a function that makes it is called after precision and seed are set.
      tasks: with distinct names.
      shared_trained: True: the shared weights learn from all tasks (K4P1, section 2, "Multitask learning"). False: they are
        frozen ("Transfer learning").
      settings: see `RunSettings`.
    """
    tasks = [tasks] if isinstance(tasks, Task) else tasks
    if isinstance(tasks, Mapping) or not all(isinstance(task, Task) for task in tasks):
        raise errors.ConfigError("tasks: expected a list of Task(...)")
    backbone = as_backbone(backbone)
    if settings.callbacks:
        callbacks.by_task(settings.callbacks, [task.name for task in tasks])
    before = keras.config.dtype_policy()
    try:
        return _run(backbone, tasks, shared_trained, settings)
    finally:
        keras.config.set_dtype_policy(before)  # what the caller builds next is none of this run's business


def _run(
    backbone: Backbone | Callable[[], Backbone], tasks: Sequence[Task], shared_trained: bool, settings: RunSettings
) -> RunResult:
    if settings.dry_run:
        return _dry_run(backbone, tasks, shared_trained, settings)
    folder = ModelDir(settings.model_dir) if settings.model_dir is not None else None
    role = where_to_run().role
    status = StatusFile()
    with contextlib.ExitStack() as held, _outcome(status), ends_on_sigterm():
        # 1. The cluster, if this is the run of one: another process joins it, made before the first variable.
        hold = _Hold(held, folder)
        cluster = None
        if role is not None:
            training = _in_coordinator(backbone, tasks, shared_trained, settings, folder)
            cluster = _connect(role, backbone, tasks, folder, settings, hold, training)
        held.enter_context(metrics_server(status, settings.metrics_port))  # a thread: after the process was copied
        # 2. The backbone, the data and models of the tasks, and the rules by which parameters are updated. What files and
        # exports need is tried here, before the first step.
        backbone, prepared, rules = _prepare(backbone, tasks, shared_trained, settings)
        counts = preflight(backbone, prepared)
        texts = settings.texts()
        # 3. The folder, if it is this run's.
        run_hash = ""
        if folder is not None:
            hold()
            description = describe(backbone, prepared, shared_trained, settings)
            run_hash = folder.begin(description, texts, settings.resume, may_grow=not settings.refit)
            unfinished.write_backbone(folder, backbone)
            status.begin(folder.root)
            for task in prepared:
                folder.write_task(task.task, task.labels, settings.seed)
        # 4. Training; the joint best state of all tasks.
        place = TrainingPlace(folder, run_hash, status, cluster)
        trained = train(prepared, rules, settings, place)
        # 5. With `refit`, once more on train and validation together, for as many steps as were best.
        if settings.refit:
            prepared = _for_refit(prepared, trained.progress.best_step)
            again = train(prepared, rules, settings, dataclasses.replace(place, refit_step=trained.progress.best_step))
            trained = dataclasses.replace(again, progress=trained.progress, history=trained.history)
        if trained.stopped is not None:
            prepared = [dataclasses.replace(task, steps=trained.stopped[task.name]) for task in prepared]
        # 6. After the last shared update every task meets the same backbone: statistics, evaluation and files, once.
        write_back(trained.groups, trained.vectors)
        evaluation = trained.evaluation
        recalibrate(prepared, settings.recalibration_batches, settings.statistics_of_shared, evaluation)
        if shared_trained:
            models = {task.name: task.patched for task in prepared}
            backbone.normalisation = backbone_normalisation.fill_in(backbone, models, settings.backbone_normalisation)
        splits = () if settings.refit else ("validation",)  # a refit has trained on validation images
        splits = (*splits, "test") if settings.evaluate_test else splits
        skipped = trained.progress.skipped
        result = finalize(backbone, prepared, folder, shared_trained, skipped, splits, settings.seed, counts, evaluation)
        if trained.step_counts is not None:
            result["cluster"] = trained.step_counts.as_json()
        if folder is not None:
            atomic.write_json(folder.result, result)
            unfinished.remove_backbone(folder)
        if not settings.quiet:
            tables.print_result(result)
            if not shared_trained:
                linear_probe.compare(backbone, prepared, result, settings)
        models = {task.name: task.patched for task in prepared}
        return RunResult(result, models, backbone, trained.history.columns())


def _prepare(
    backbone: Backbone | Callable[[], Backbone], tasks: Sequence[Task], shared_trained: bool, settings: RunSettings
) -> tuple[Backbone, list[PreparedTask], Rules]:
    """Backbone, tasks and rules. Precision and seed come before the first variable."""
    backbone_normalisation.check(settings.backbone_normalisation, [task.name for task in tasks])
    keras.config.set_dtype_policy(settings.precision)
    keras.utils.set_random_seed(settings.seed)
    backbone = backbone() if callable(backbone) else backbone
    prepared = prepare_tasks(
        backbone,
        tasks,
        shared_trained=shared_trained,
        steps=settings.steps,
        epochs=settings.epochs,
        seed=settings.seed,
        starts=read_warm_starts(tasks, backbone),
        teachers=read_teachers(tasks),
    )
    if settings.patience is not None and not any(task.splits.has("validation") for task in prepared):
        raise errors.ConfigError("patience: no task has a validation split that could stop getting better")
    if not shared_trained:
        _warn_of_random_heads(prepared)
        _warn_of_untouched_normalisation(backbone, prepared)
    split = "train+validation" if settings.refit else "train"
    examples = {task.name: task.splits.size(split) for task in prepared}
    optimizer = settings.optimizer or OptimizerConfig()
    rules = optimizer.resolved({task.name: task.task.learning_rate for task in prepared}, examples)
    frozen = freeze({task.name: task.patched for task in prepared}, rules)
    prepared = [dataclasses.replace(task, patched=frozen[task.name]) for task in prepared]
    _warn_of_unmatched_rules(prepared, rules)
    return backbone, prepared, rules


def _dry_run(backbone, tasks: Sequence[Task], shared_trained: bool, settings: RunSettings) -> RunResult:
    backbone, prepared, rules = _prepare(backbone, tasks, shared_trained, settings)
    preflight(backbone, prepared)
    settings.texts()
    tables.print_parameters(prepared)
    trained = train(prepared, rules, settings, TrainingPlace(), stop_after=len(prepared))
    tables.print_updates(trained.groups, _frozen_by_rules(prepared, rules))
    print("dry run: every task took one step; nothing was written")
    return RunResult({}, {task.name: task.patched for task in prepared}, backbone)


def _frozen_by_rules(prepared: Sequence[PreparedTask], rules: Rules) -> dict[str, int]:
    """How many values each rule freezes."""
    sizes: dict[str, dict[int, int]] = {}
    for task in prepared:
        for p in task.patched.parameters:
            update = rules.update_of(p, task.name)
            if p.role == FIXED and update.frozen and not p.auxiliary:
                sizes.setdefault(update.sources["frozen"], {})[id(p.variable)] = p.size
    return {source: sum(found.values()) for source, found in sizes.items()}


class _Hold:
    """Takes the folder for this run, once; it is released with the stack."""

    def __init__(self, stack: contextlib.ExitStack, folder: ModelDir | None):
        self._stack, self._folder = stack, folder
        self._lock: RunLock | None = None

    def __call__(self) -> None:
        if self._folder is not None:
            folder, self._folder = self._folder, None
            check_usable(folder.root)
            self._lock = self._stack.enter_context(run_lock(folder.root))

    def waits_for(self, whom: str) -> None:
        """Writes into the folder for whom the coordinator waits."""
        if self._lock is not None:
            self._lock.waits_for(whom)


@contextlib.contextmanager
def _outcome(status: StatusFile) -> Iterator[None]:
    """Writes how the run ended into its status."""
    try:
        yield
    except (errors.Preempted, errors.Interrupted, errors.ClusterError) as e:
        status.end(status_file.STOPPED, str(e))
        raise
    except errors.K4p1Error as e:
        status.end(status_file.FAILED, str(e))
        raise
    except BaseException as e:
        status.end(status_file.FAILED, f"{type(e).__name__}: {e}")
        raise
    status.end(status_file.FINISHED)


def _connect(
    role: ClusterSpec,
    backbone: Backbone | Callable[[], Backbone],
    tasks: Sequence[Task],
    folder: ModelDir | None,
    settings: RunSettings,
    hold: "_Hold",
    training: "Training",
) -> "RunCluster":
    from k4p1.cluster.run_cluster import RunCluster

    if isinstance(backbone, Backbone):
        raise errors.ConfigError("on a cluster, give a function that makes the backbone: variables made before are lost")
    if settings.patience is not None:
        raise errors.ConfigError("patience: a run on a cluster trains to its step targets; give steps, or one machine")
    if settings.jit_compile:
        raise errors.ConfigError("jit_compile=True: XLA cannot compile steps whose vectors are on parameter servers")
    workers = {task.name: (task.workers, task.worker_share) for task in tasks}
    RunCluster.check(role, workers, settings)
    resumes = folder is not None and settings.resume
    before = status_file.read_if_whole(folder.root).get("tasks", {}) if resumes else {}
    known_steps = {task: values.get("done", 0) for task, values in before.items()}
    hold()
    root = None if folder is None else folder.root
    return RunCluster.begin(role, workers, settings, known_steps, root, settings.configuration, training, hold.waits_for)


def _in_coordinator(
    backbone: Backbone | Callable[[], Backbone],
    tasks: Sequence[Task],
    shared_trained: bool,
    settings: RunSettings,
    folder: ModelDir | None,
) -> "Training":
    """What the process that coordinates the cluster does of a run."""

    def training(order: "Order", coordinator: "Coordinator") -> Mapping[str, Any]:
        _, prepared, rules = _prepare(backbone, tasks, shared_trained, settings)
        if order.refit_step is not None:
            prepared = _for_refit(prepared, order.refit_step)
        place = TrainingPlace(folder, order.run_hash, coordinator=coordinator, refit_step=order.refit_step)
        return train(prepared, rules, settings, place).vectors

    return training


def _for_refit(prepared: Sequence[PreparedTask], best_step: int) -> list[PreparedTask]:
    total, best_step = sum(task.steps for task in prepared), max(best_step, 1)
    return [dataclasses.replace(t, steps=max(1, round(t.steps * best_step / total))) for t in prepared]


def _warn_of_random_heads(prepared: Sequence[PreparedTask]) -> None:
    for task in prepared:
        if task.patched.spec.shares_head:
            print(
                f"task '{task.name}': '{task.patched.spec}' does not own its head, and shared weights are frozen: the head "
                "stays at its random values (K4P1's \"random last\"); add '+head' to train it"
            )


def _warn_of_untouched_normalisation(backbone: Backbone, prepared: Sequence[PreparedTask]) -> None:
    """Says where frozen statistics are those of no data: of a new network, or left by a run under private normalisation."""
    for task in prepared:
        shared = {p.key for p in task.patched.parameters if p.owner == SHARED}
        if backbone.normalisation == UNTOUCHED and any(key.endswith("/moving_mean") for key in shared):
            errors.warn(
                f"task '{task.name}' uses the batch normalisation of '{backbone.name}', which nobody has trained (its run "
                "had backbone_normalisation='none'); add 'scale_bias' to the patch"
            )
        elif (count := backbone_normalisation.untouched_layers(backbone, task.patched)) > 0:
            print(
                f"task '{task.name}': '{task.patched.spec}' uses {count} batch normalisations of '{backbone.name}' that are "
                "those of a new network (means 0, variances 1); add 'scale_bias' unless that is meant"
            )


def _warn_of_unmatched_rules(prepared: Sequence[PreparedTask], rules: Rules) -> None:
    for rule in rules.unmatched({task.name: task.patched for task in prepared}):
        errors.warn(f"{rule.source} matches no parameter of this run")
