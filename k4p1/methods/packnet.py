"""PackNet: tasks packed into one network by pruning, one after another (Mallya and Lazebnik, 2018; compared with in PB)."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from k4p1 import checks, errors
from k4p1.backbones import build
from k4p1.backbones import files as backbone_files
from k4p1.backbones.backbone import Backbone
from k4p1.cluster import spec as cluster_spec
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.files import atomic
from k4p1.files.run_lock import check_usable, run_lock
from k4p1.methods.finetune import finetune
from k4p1.patches import patch_file
from k4p1.patches.apply import apply_patches
from k4p1.patches.patched_model import PatchedModel
from k4p1.runs import tables
from k4p1.runs.evaluate import evaluate
from k4p1.runs.finalize import described, write_task
from k4p1.runs.model_dir import ModelDir, plain_task
from k4p1.runs.run import RunResult
from k4p1.runs.settings import RunSettings
from k4p1.tasks import objectives
from k4p1.tasks.task import Task

_TRAINED, _PACKED = "packnet+head", "mask+head"
_SLOWER = 0.1  # PB, section 4: the learning rate after pruning, over that before


def packnet(
    *,
    backbone: Backbone | Callable[[], Backbone],
    tasks: Sequence[Task],
    model_dir: str | pathlib.Path | None = None,
    backbone_prune: float = 0.5,
    prune: float = 0.75,
    retrain: float = 0.5,
    retrain_learning_rate: float | None = None,
    **settings,
) -> RunResult:
    """Gives each task in turn the weights that are free, keeps the largest of what it learned, and frees the rest.

    For task t: train the free weights W[owner = none]; in every layer set the smallest `prune` of them to zero; train the
    kept ones again; they are t's from then on. At the end every task is a binary mask over one backbone, 1 where the owner
    is the first network or a task up to t, so that earlier tasks stay bit for bit what they were. Batch normalisation is
    the backbone's (PackNet fixes it). The order of `tasks` matters: later ones find fewer free weights.

    Args:
      backbone: pretrained; its own smallest weights are pruned first, without training it again.
      tasks: in their order; their patch specs are not looked at.
      model_dir: the packed backbone with one `mask+head` patch per task; `stages/` holds the runs on the way, from which an
        interrupted call resumes.
      backbone_prune: share of the backbone's weights that are freed, layer by layer (PB, section 4: 0.5).
      prune: share of a task's weights that are freed (PB: 0.75).
      retrain: steps after pruning, as a share of the task's (PB: 15 of 30 epochs).
      retrain_learning_rate: of these steps; None: a tenth of the task's (PB: 1e-4 after 1e-3).
      **settings: fields of `k4p1.runs.settings.RunSettings`.

    Raises:
      ConfigError: a share that is not inside (0, 1), or a learning rate that is not positive.
    """
    if retrain_learning_rate is not None:
        checks.check_number("packnet: retrain_learning_rate", retrain_learning_rate, checks.POSITIVE)
    for name, value in {"backbone_prune": backbone_prune, "prune": prune, "retrain": retrain}.items():
        if not 0 < value < 1:
            raise errors.ConfigError(f"packnet({name}={value}): expected a share between 0 and 1")
    if cluster_spec.from_environment() is not None:
        raise errors.ConfigError("packnet runs on one machine: a task begins with the network that the one before left")
    if settings.get("dry_run"):
        return finetune(backbone=backbone, tasks=[dataclasses.replace(t, patch=_TRAINED) for t in tasks], **settings)
    if model_dir is None:
        raise errors.ConfigError("packnet needs a model_dir: every task continues from what the one before left there")
    names = [task.name for task in tasks]
    for task in tasks:
        if objectives.find(task.objective) is not objectives.CLASSIFICATION:
            raise errors.ConfigError(f"task '{task.name}': packnet packs tasks that classify; its objective is another one")
    for name in names:
        if names.count(name) > 1:
            raise errors.ConfigError(f"task name '{name}' is used twice; every task needs its own")
    folder, how = ModelDir(model_dir), RunSettings.of("packnet", **settings)
    check_usable(folder.root)
    with contextlib.ExitStack() as held:
        held.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
        keras.config.set_dtype_policy(how.precision)
        keras.utils.set_random_seed(how.seed)
        first = backbone() if callable(backbone) else backbone
        held.enter_context(run_lock(folder.root))
        described_run = {
            "backbone": first.fingerprint(),
            "tasks": [{**plain_task(task), "schedule": repr(task.schedule)} for task in tasks],
            "packnet": [backbone_prune, prune, retrain, retrain_learning_rate],
            "seed": how.seed,
        }
        folder.begin(described_run, how.texts(), how.resume)
        return _pack(first, tasks, folder, (backbone_prune, prune, retrain), retrain_learning_rate, settings)


def _pack(
    first: Backbone,
    tasks: Sequence[Task],
    folder: ModelDir,
    shares: tuple[float, float, float],
    retrain_learning_rate: float | None,
    settings: Mapping[str, Any],
) -> RunResult:
    backbone_prune, prune, retrain = shares
    optimizer = settings.get("optimizer") or OptimizerConfig()
    weights = first.tensors()
    owners = {}
    for key in _kernels(first):
        kept = _largest(weights[key], np.ones(weights[key].shape, bool), 1.0 - backbone_prune)
        weights[key] = weights[key] * kept
        owners[key] = np.where(kept, 0, -1)
    heads, entries = {}, {}
    for number, task in enumerate(tasks, 1):
        stage = folder.root / "stages" / f"{number}_{task.name}"
        present = _with_values(first, weights)
        learned, learned_steps = _train(present, task, stage / "train", settings)
        own, kept = {}, {}
        for key in owners:
            values = _own(learned, key)
            kept[key] = _largest(values, owners[key] < 0, 1.0 - prune)
            own[key] = values * kept[key]
        start = stage / "pruned.safetensors"
        _write_pruned(start, present, learned, own, kept, task.name)
        steps = max(1, round(retrain * learned_steps))
        rate = retrain_learning_rate or _SLOWER * (task.learning_rate or optimizer.learning_rate)
        again = dataclasses.replace(task, init_from=str(start), steps=steps, epochs=None, learning_rate=rate)
        learned, _ = _train(present, again, stage / "retrain", settings)
        for key in owners:
            weights[key] = np.where(kept[key], _own(learned, key), weights[key])
            owners[key] = np.where(kept[key], number, owners[key])
        heads[task.name] = {v.name: keras.ops.convert_to_numpy(v) for v in learned.head.variables}
    # Every task as a mask over what all of them made together.
    packed = _with_values(first, weights)
    backbone_files.save(packed, folder.backbone)
    models = {}
    for number, task in enumerate(tasks, 1):
        info = patch_file.read_info(ModelDir(folder.root / "stages" / f"{number}_{task.name}" / "retrain").patch(task.name))
        patched = apply_patches(
            packed, _PACKED, classes=len(info.labels), image_size=info.image_size, dropout=task.dropout, name=task.name
        )
        for parameter in patched.owned():
            if parameter.storage is not None:
                key = f"{parameter.key.rsplit('/', 2)[0]}/kernel"
                bits = np.packbits(((owners[key] >= 0) & (owners[key] <= number)).reshape(-1), bitorder="little")
                parameter.variable.assign(parameter.storage.decode(bits))
        for variable in patched.head.variables:
            variable.assign(heads[task.name][variable.name])
        folder.write_task(dataclasses.replace(task, patch=_PACKED), info.labels, settings.get("seed", 0))
        size = write_task(folder, task.name, patched, packed, info.labels, task.dropout)
        entries[task.name] = {"steps": 0, **described(patched), "patch_bytes": size, "validation_accuracy": None}
        models[task.name] = patched
    for task in tasks:
        metrics = evaluate(folder.root, task.name, data=task.data)[task.name]
        entries[task.name] |= {f"test_{metric}": value for metric, value in metrics.items() if metric != "examples"}
    return _finish(folder, packed, models, entries, owners, settings)


def free_share(owners: Mapping[str, np.ndarray]) -> float:
    """The share of weights that no task owns."""
    return sum(int(np.sum(o < 0)) for o in owners.values()) / sum(o.size for o in owners.values())


def _finish(folder: ModelDir, packed: Backbone, models, entries, owners, settings: Mapping[str, Any]) -> RunResult:
    summary = {
        "shared_parameters": sum(value.size for value in packed.tensors().values()),
        "shared_trained": True,
        "free_weights": free_share(owners),
        "tasks": entries,
    }
    atomic.write_json(folder.result, summary)
    if not settings.get("quiet"):
        tables.print_result(summary)
    return RunResult(summary, models, packed)


def _kernels(backbone: Backbone) -> list[str]:
    """Keys of the weights that PackNet prunes: those that a mask can cover."""
    patched = apply_patches(backbone, "packnet", classes=2, image_size=backbone.minimum_size or 32)
    return [p.key.removesuffix("packnet/own") + "kernel" for p in patched.owned() if p.key.endswith("/packnet/own")]


def _largest(values: np.ndarray, where: np.ndarray, share: float) -> np.ndarray:
    """The `share` of the places in `where` with the largest magnitudes."""
    count = round(share * int(where.sum()))
    kept = np.zeros(values.size, bool)
    order = np.argsort(np.where(where, -np.abs(values), np.inf).reshape(-1), kind="stable")
    kept[order[:count]] = True
    return kept.reshape(values.shape)


def _with_values(like: Backbone, weights: Mapping[str, np.ndarray]) -> Backbone:
    made = build.from_config(like.name, like.config, like.scaling)
    made.assign(weights)
    return made


def _train(backbone: Backbone, task: Task, folder: pathlib.Path, settings: Mapping[str, Any]) -> tuple[PatchedModel, int]:
    """The task model with its free weights trained, and the steps that took."""
    task = dataclasses.replace(task, patch=_TRAINED)
    result = finetune(backbone=backbone, task=task, **{**settings, "model_dir": folder})
    return result.models[task.name], result.summary["tasks"][task.name]["steps"]


def _own(patched: PatchedModel, key: str) -> np.ndarray:
    return keras.ops.convert_to_numpy(patched.private()[f"{key.rsplit('/', 1)[0]}/packnet/own"])


def _write_pruned(path, backbone: Backbone, learned: PatchedModel, own, kept, task: str) -> None:
    """The task's patch after pruning, from which it is trained again."""
    private = learned.private()
    for key in own:
        layer = key.rsplit("/", 1)[0]
        private[f"{layer}/packnet/own"].assign(own[key])
        private[f"{layer}/packnet/free"].assign(kept[key].astype(np.float32))
    classes = learned.head.kernel.shape[-1]
    patch_file.save_patch(path, learned, backbone, task=task, labels=[str(i) for i in range(classes)])
