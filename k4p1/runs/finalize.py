"""The end of a run: population statistics, evaluation, and what every task leaves on disk."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from k4p1 import errors
from k4p1.backbones import files as backbone_files
from k4p1.backbones.backbone import Backbone
from k4p1.engine.bookkeeping import Evaluation
from k4p1.engine.data_errors import data_errors
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.groups import STATISTICS, plan_groups, write_back
from k4p1.engine.population import PopulationStatistics
from k4p1.engine.pure import PureTask
from k4p1.patches import costs, factor_file, patch_file
from k4p1.patches.apply import apply_patches, warn_of_kinds
from k4p1.patches.costs import TaskCosts
from k4p1.patches.patched_layer import FIXED, TRAINED
from k4p1.patches.patched_model import PRIVATE, SHARED, PatchedModel
from k4p1.patches.task_head import DEFAULT_OBJECTIVE
from k4p1.runs.evaluate import evaluate
from k4p1.runs.model_dir import ModelDir
from k4p1.runs.preflight import counted
from k4p1.runs.warm_start import model_dir_of
from k4p1.tasks import objectives
from k4p1.tasks.distillation import Lesson
from k4p1.tasks.prepare import PreparedTask
from k4p1.tasks.tailoring import ATTENTION


def recalibrate(
    prepared: Sequence[PreparedTask], batches: int, of_shared: str = "pooled", evaluation: Evaluation | None = None
) -> None:
    """Replaces the moving statistics of the Keras variables by population statistics, private and shared ones.

    Args:
      prepared: the tasks.
      batches: per task.
      of_shared: see `PopulationStatistics`.
      evaluation: of the same models, where training has left one.
    """
    groups, _, population = evaluation or evaluation_of(prepared)
    write_back(groups, population({group.name: group.initial() for group in groups}, batches, of_shared))


def evaluation_of(prepared: Sequence[PreparedTask]) -> Evaluation:
    """What evaluates tasks that were not trained here."""
    groups = plan_groups({task.name: task.patched for task in prepared})
    tasks = {task.name: PureTask(task.name, task.patched, groups) for task in prepared}
    evaluators = {task.name: Evaluator(tasks[task.name], task.metrics) for task in prepared}
    calibration = {task.name: task.pipeline.calibration for task in prepared}
    return Evaluation(groups, evaluators, PopulationStatistics(list(tasks.values()), calibration))


def finalize(
    backbone: Backbone,
    prepared: Sequence[PreparedTask],
    folder: ModelDir | None,
    shared_trained: bool,
    skipped: Mapping[str, int],
    evaluated: Sequence[str],
    seed: int,
    counts: Mapping[str, TaskCosts],
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    """Evaluates every task, writes backbone, heads, factors and patches, and returns what `result.json` holds.

    Args:
      backbone: as it is after the last update.
      prepared: the tasks, their models trained.
      folder: where files are written; None: nowhere.
      shared_trained: whether shared weights were learned.
      skipped: corrupt images met in training, by task.
      evaluated: splits.
      seed: of the run.
      counts: costs of the tasks by name.
      evaluation: of the same models, where training has left one.
    """
    if folder is not None:
        backbone_files.save(backbone, folder.backbone)
    groups, evaluators, _ = evaluation or evaluation_of(prepared)
    vectors = {group.name: group.initial() for group in groups}
    shared = {
        p.key: p.size for t in prepared for p in t.patched.parameters if p.owner == SHARED and p.role in (TRAINED, FIXED)
    }
    result: dict[str, Any] = {
        "shared_parameters": sum(shared.values()),
        "shared_trained": shared_trained,
        "model_size_ratio": costs.model_size_ratio(backbone, [task.patched for task in prepared]),
        "tasks": {},
    }
    for task in prepared:
        warn_of_kinds(task.patched)
        metric = task.task.metric_names[0]
        entry = {
            "steps": task.steps,
            **described(task.patched, counts[task.name]),
            "patch_bytes": None,
            f"validation_{metric}": None,
        }
        entry["metric"] = metric
        entry["skipped_images"] = _skipped(task) if skipped.get(task.name) else 0
        for split in evaluated:
            if task.splits.has(split):
                metrics = evaluators[task.name](vectors, task.pipeline.sequential(split))
                entry |= {f"{split}_{name}": value for name, value in metrics.items() if _is_result(name)}
        if folder is not None:
            objective = objectives.find(task.task.objective).name
            entry["patch_bytes"] = write_task(
                folder, task.name, task.patched, backbone, task.labels, task.task.dropout, objective
            )
        result["tasks"][task.name] = entry
    for task in prepared:
        for lesson in task.lessons.values():
            if lesson.old_head is not None:
                result["tasks"][lesson.teacher.task] = _keep_old_task(lesson, backbone, folder, seed)
    return result


def _keep_old_task(lesson: Lesson, backbone: Backbone, folder: ModelDir | None, seed: int) -> dict[str, Any]:
    """The task of a teacher on the backbone that has moved, with its old head as the run left it.

    Its accuracy on its own test split is in the entry where its data can be opened again.
    """
    teacher = lesson.teacher
    patched = apply_patches(
        backbone, "head", classes=len(teacher.labels), image_size=teacher.patched.image_size, name=teacher.task
    )
    for mine, learned in zip(patched.head.variables, lesson.old_head.variables, strict=True):
        mine.assign(learned)
    entry = {"steps": 0, **described(patched), "patch_bytes": None, "metric": "accuracy"}
    if folder is None:
        return entry
    definition, _ = model_dir_of(pathlib.Path(teacher.path).expanduser()).read_task(teacher.task)
    entry["metric"] = definition.metric_names[0]
    definition = dataclasses.replace(definition, patch=patched.spec, init_from="", teacher="", loss=None)
    folder.write_task(definition, teacher.labels, seed)
    entry["patch_bytes"] = write_task(folder, teacher.task, patched, backbone, teacher.labels, 0.0)
    with contextlib.suppress(errors.ConfigError, errors.DataError):  # its data may have been a Python object, or gone
        metrics = evaluate(folder.root, teacher.task)[teacher.task]
        entry |= {f"test_{name}": value for name, value in metrics.items() if name != "examples"}
    return entry


def described(patched: PatchedModel, cost: TaskCosts | None = None) -> dict[str, Any]:
    """Parameters and costs of a task as plain values; the costs are counted where they are not given."""
    cost = cost or counted(patched)
    return {
        "patch": str(patched.spec),
        "private_parameters": patched.count(PRIVATE, TRAINED, FIXED),
        "private_trained": patched.count(PRIVATE, TRAINED),
        "private_fixed": patched.count(PRIVATE, FIXED),
        "private_statistics": patched.count(PRIVATE, STATISTICS),
        "private_bits_without_head": cost.private_bits,
        "multiply_adds": cost.multiply_adds,
        "multiply_adds_added": cost.added_unfolded,
        "multiply_adds_added_folded": cost.added_folded,
        **(patched.rewiring.facts() if patched.rewiring else {}),
    }


def write_task(
    folder: ModelDir,
    name: str,
    patched: PatchedModel,
    backbone: Backbone,
    labels: Sequence[str],
    dropout: float,
    objective: str = DEFAULT_OBJECTIVE,
) -> int:
    """Writes a task's patch file, and the head and factors that it shares; returns the bytes of the patch file."""
    path = folder.patch(name)
    info = patch_file.save_patch(path, patched, backbone, task=name, labels=labels, dropout=dropout, objective=objective)
    if info.shared_head:
        patch_file.save_head(folder.heads, patched, labels)
    if info.factors:
        factor_file.save_factors(folder.factors, patched, info.fingerprint)
    return path.stat().st_size


def _is_result(metric: str) -> bool:
    """Whether a metric belongs into `result.json`; the attention of every path is for curves and pictures."""
    return metric != "examples" and not metric.startswith(ATTENTION)


def _skipped(task: PreparedTask) -> int:
    """Corrupt images of the training split; names the first ones."""
    with data_errors(task.name):
        bad = task.pipeline.skipped("train")
    named = task.pipeline.corrupt_files("train", limit=5)
    listed = f": {', '.join(named)}" if named else ""
    print(f"task '{task.name}': {bad} corrupt images of its training split were skipped{listed}")
    return bad
