"""The end of a run: population statistics, evaluation, and what every task leaves on disk."""

from collections.abc import Mapping, Sequence
from typing import Any

from k4p1.backbones import files as backbone_files
from k4p1.backbones.backbone import Backbone
from k4p1.engine.evaluation import Evaluator
from k4p1.engine.groups import STATISTICS, plan_groups, write_back
from k4p1.engine.optimization import Optimization
from k4p1.engine.population import PopulationStatistics
from k4p1.engine.pure import PureTask
from k4p1.experiments.model_dir import ModelDir
from k4p1.export import costs, factor_file, patch_file
from k4p1.patches.apply import warn_of_zeroed_layers
from k4p1.patches.patched_layer import FIXED, TRAINED
from k4p1.patches.patched_model import PRIVATE, SHARED, PatchedModel
from k4p1.tasks.prepare import PreparedTask


def recalibrate(prepared: Sequence[PreparedTask], batches: int) -> None:
    """Replaces the moving statistics of the Keras variables by population statistics, private and shared ones."""
    groups = plan_groups({task.name: task.patched for task in prepared}, Optimization())
    tasks = [PureTask(task.name, task.patched, groups) for task in prepared]
    population = PopulationStatistics(tasks, {task.name: task.pipeline.calibration for task in prepared})
    write_back(groups, population({group.name: group.initial() for group in groups}, batches))


def finish(
    backbone: Backbone,
    prepared: Sequence[PreparedTask],
    folder: ModelDir | None,
    shared_trained: bool,
    skipped: Mapping[str, int],
    evaluated: Sequence[str],
) -> dict[str, Any]:
    """Evaluates every task, writes backbone, heads, factors and patches, and returns what `result.json` holds.

    Args:
      backbone: as it is after the last update.
      prepared: the tasks, their models trained.
      folder: where files are written; None: nowhere.
      shared_trained: whether shared weights were learned.
      skipped: corrupt images met in training, by task.
      evaluated: splits.
    """
    if folder is not None:
        backbone_files.save(backbone, folder.backbone)
    groups = plan_groups({task.name: task.patched for task in prepared}, Optimization())
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
        warn_of_zeroed_layers(task.patched)
        evaluator = Evaluator(PureTask(task.name, task.patched, groups), task.metrics)
        entry = {"steps": task.steps, **described(task.patched), "patch_bytes": None, "validation_accuracy": None}
        entry["skipped_images"] = _skipped(task) if skipped.get(task.name) else 0
        for split in evaluated:
            if task.splits.has(split):
                metrics = evaluator(vectors, task.pipeline.sequential(split))
                entry |= {f"{split}_{name}": value for name, value in metrics.items() if name != "examples"}
        if folder is not None:
            entry["patch_bytes"] = write_task(folder, task.name, task.patched, backbone, task.labels, task.task.dropout)
        result["tasks"][task.name] = entry
    return result


def described(patched: PatchedModel) -> dict[str, Any]:
    """Parameters and costs of a task as plain values; see `k4p1.export.costs`."""
    cost = costs.task_costs(patched)
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
    }


def write_task(
    folder: ModelDir, name: str, patched: PatchedModel, backbone: Backbone, labels: Sequence[str], dropout: float
) -> int:
    """Writes a task's patch file, and the head and factors that it shares; returns the bytes of the patch file."""
    path = folder.patch(name)
    info = patch_file.save_patch(path, patched, backbone, task=name, labels=labels, dropout=dropout)
    if info.shared_head:
        patch_file.save_head(folder.heads, patched, labels)
    if info.factors:
        factor_file.save_factors(folder.factors, patched, info.fingerprint)
    return path.stat().st_size


def _skipped(task: PreparedTask) -> int:
    """Corrupt images of the training split; names the first ones."""
    bad = task.pipeline.skipped("train")
    named = task.pipeline.corrupt_files("train", limit=5)
    listed = f": {', '.join(named)}" if named else ""
    print(f"task '{task.name}': {bad} corrupt images of its training split were skipped{listed}")
    return bad
