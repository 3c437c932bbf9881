"""Joint compression of the adapters of several finished tasks (RA, section 3.4)."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from k4p1 import errors
from k4p1.backbones import files as backbone_files
from k4p1.backbones.backbone import Backbone
from k4p1.backbones.series_adapters import SharedSeriesAdapter
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.files import atomic
from k4p1.patches import costs, joint_compression, patch_file, task_head
from k4p1.patches.apply import apply_patches
from k4p1.patches.joint_compression import Spectrum
from k4p1.patches.kinds.residual_adapter import AdapterKind
from k4p1.patches.patched_model import PatchedModel
from k4p1.runs.evaluate import evaluate
from k4p1.runs.finalize import described, write_task
from k4p1.runs.model_dir import ModelDir
from k4p1.runs.run import run
from k4p1.runs.settings import RunSettings

FINETUNED = "finetuned"


@dataclasses.dataclass(frozen=True)
class Compression:
    """What a joint compression did.

    Attributes:
      folder: a model directory with the compressed tasks.
      share: the side of the adapters that the tasks share, `input` or `output`.
      ranks: K by layer.
      energy: the share of the squared singular values that was kept, in [0, 1].
      bytes_before, bytes_after: of the adapters of all tasks; after, shared factors included.
      accuracy_before, accuracy_after: on the test split, by task.
      accuracy_finetuned: after fine-tuning, by task; empty without.
    """

    folder: pathlib.Path
    share: str
    ranks: Mapping[str, int]
    energy: float
    bytes_before: int
    bytes_after: int
    accuracy_before: Mapping[str, float]
    accuracy_after: Mapping[str, float]
    accuracy_finetuned: Mapping[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class _Finished:
    """A finished task: where it is, its patch file's description, its model."""

    name: str
    folder: ModelDir
    info: patch_file.PatchInfo
    patched: PatchedModel | None = None


def compress(
    model_dirs: Sequence[str | pathlib.Path],
    output_dir: str | pathlib.Path,
    tasks: Sequence[str] = (),
    rank: float | None = None,
    budget: int | None = None,
    finetune_steps: int = 0,
    optimizer: OptimizerConfig | None = None,
    share: str = joint_compression.OUTPUT,
) -> Compression:
    """Stacks the adapters of several tasks layer by layer, `[alpha_1 ... alpha_T] = U S V`, and keeps K singular values.

    `U S` becomes shared by the tasks, `V_t` stays private. The tasks in `model_dirs` stay as they are.

    Args:
      model_dirs: finished runs on one backbone.
      output_dir: a new or empty folder; it becomes a model directory of the compressed tasks. Fine-tuned ones are written to
        `finetuned` inside it.
      tasks: names; all tasks of the runs if empty.
      rank: K as a share of the channels; RA takes 0.5.
      budget: in place of `rank`: bytes of all factors; ranks are chosen layer by layer, most energy per byte first.
      finetune_steps: steps per task in which its own factors, batch normalisation and head keep learning; the shared
        factors stay.
      optimizer: of the fine-tuning.
      share: the side of the adapters that the tasks share: `output`, as RA's matrices are indexed, or `input`; see
        `k4p1.patches.joint_compression`.

    Raises:
      ConfigError: an unknown task, a folder that is in use, both or none of `rank` and `budget`.
      PatchError: tasks of different backbones or kinds, without adapters, or a rank, budget or side that cannot be.
    """
    if share not in joint_compression.SHARED_FACTOR:
        raise errors.ConfigError(errors.unknown("side of the adapters to share", share, joint_compression.SHARED_FACTOR))
    if (rank is None) == (budget is None):
        raise errors.ConfigError("give either rank (a share of the channels) or budget (bytes)")
    output = ModelDir(output_dir)
    if output.root.exists() and (not output.root.is_dir() or any(output.root.iterdir())):
        raise errors.ConfigError(f"{output.root} is not empty; give a new folder for the compressed tasks")
    # 1. The tasks, on one backbone, with one kind of adapter.
    found = _open(model_dirs, tasks)
    kind = _common_kind(found)
    backbone = found[0].folder.load_backbone()
    found = [dataclasses.replace(t, patched=t.folder.load_task(t.name, backbone)) for t in found]
    if kind == "series_adapter" and any(isinstance(site.layer, SharedSeriesAdapter) for site in backbone.sites):
        raise errors.PatchError(
            f"the tasks' adapters are copies of those that '{backbone.name}' was trained with; joint compression is for "
            "adapters that were added to a network"
        )
    before = {task.name: _accuracy(task.folder, task.name) for task in found}
    seeds = {task.folder.read_task(task.name)[1] for task in found}
    if finetune_steps and len(seeds) > 1:
        raise errors.ConfigError(
            f"these tasks were trained with seeds {', '.join(map(str, sorted(seeds)))}, and their validation images differ; "
            "fine-tune only tasks of one seed together, or leave finetune_steps out"
        )
    # 2. Layer by layer: stack, decompose, choose K.
    alphas = {task.name: _alphas(task.patched, kind) for task in found}
    spectra = {layer: Spectrum.of({n: alphas[n][layer] for n in alphas}, share) for layer in alphas[found[0].name]}
    if rank is not None:
        ranks = joint_compression.ranks_of_share(spectra, rank)
    else:
        ranks = joint_compression.ranks_of_budget(spectra, budget)
    common, own = joint_compression.SHARED_FACTOR[share], joint_compression.own_factor(share)
    shared = {
        f"{layer}/{kind}/{common}": keras.Variable(spectrum.shared(ranks[layer]), trainable=False, name=common)
        for layer, spectrum in spectra.items()
    }
    # 3. The compressed tasks as a model directory of their own.
    compressed = {}
    for number, task in enumerate(found):
        mine = {f"{layer}/{kind}/{own}": spectra[layer].own(ranks[layer], number) for layer in spectra}
        compressed[task.name] = _compressed(task, backbone, shared, mine)
    _write(output, backbone, found, compressed)
    after = {task.name: _accuracy(output, task.name) for task in found}
    # 4. The tasks' own factors keep learning.
    finetuned = {}
    if finetune_steps:
        finetuned = _finetune(output, backbone, [task.name for task in found], finetune_steps, optimizer)
    return Compression(
        folder=output.root,
        share=share,
        ranks=ranks,
        energy=joint_compression.energy_kept(spectra, ranks),
        bytes_before=sum(4 * p.size for task in found for p in task.patched.owned() if _is_matrix(p.key, kind)),
        bytes_after=joint_compression.factor_bytes(spectra, ranks),
        accuracy_before=before,
        accuracy_after=after,
        accuracy_finetuned=finetuned,
    )


def _open(model_dirs: Sequence[str | pathlib.Path], names: Sequence[str]) -> list[_Finished]:
    folders = [ModelDir(path) for path in model_dirs]
    known: dict[str, ModelDir] = {}
    for folder in folders:
        for name in folder.tasks():
            if name in known:
                raise errors.ConfigError(f"task '{name}' is in {known[name].root} and in {folder.root}; give one of them")
            known[name] = folder
    for name in names:
        if name not in known:
            raise errors.ConfigError(errors.unknown(f"task of {', '.join(str(f.root) for f in folders)}", name, known))
    chosen = list(dict.fromkeys(names)) or sorted(known)
    return [_Finished(n, known[n], patch_file.read_info(known[n].patch(n))) for n in chosen]


def _common_kind(found: Sequence[_Finished]) -> str:
    """The adapter kind of all tasks, which share one backbone."""
    first, first_kinds = found[0], _adapters(found[0])
    for task in found:
        if task.info.fingerprint != first.info.fingerprint:
            raise errors.PatchError(
                f"tasks '{first.name}' and '{task.name}' are for different backbones ({first.info.fingerprint[:12]}, "
                f"{task.info.fingerprint[:12]}); their adapters have nothing in common to share"
            )
        if _adapters(task) != first_kinds:
            raise errors.PatchError(
                f"tasks '{first.name}' ('{first.info.spec}') and '{task.name}' ('{task.info.spec}') have different "
                "adapters; compress tasks of one kind, on the same layers"
            )
        if task.info.factors:
            raise errors.PatchError(f"task '{task.name}' shares factors already; compress the tasks that it was made from")
    if len(first_kinds) != 1:
        has = "no adapters" if not first_kinds else "several kinds of adapters"
        raise errors.PatchError(
            f"'{first.info.spec}' has {has}; compress needs series_adapter or parallel_adapter in a spec"
        )
    return first_kinds[0].name


def _adapters(task: _Finished) -> list[AdapterKind]:
    """The adapter kinds of a task's spec, where they are and nothing else."""
    kinds = [kind for kind in task.info.spec.kinds if isinstance(kind, AdapterKind)]
    return [dataclasses.replace(kind, rank=0, init="same", init_std=0.0, dropout=0.0) for kind in kinds]


def _is_matrix(key: str, kind: str) -> bool:
    """Whether a private parameter is an adapter's alpha or one of its factors."""
    return f"/{kind}/" in key and key.rsplit("/", 1)[1] in ("alpha", "beta", "gamma")


def _alphas(patched: PatchedModel, kind: str) -> dict[str, np.ndarray]:
    """alpha (C, D) by layer, `beta @ gamma.T` where a task has a rank of its own."""
    values = {key: keras.ops.convert_to_numpy(v) for key, v in patched.private().items() if f"/{kind}/" in key}
    layers = dict.fromkeys(key.rsplit("/", 2)[0] for key in values)
    return {
        layer: values[f"{layer}/{kind}/alpha"]
        if f"{layer}/{kind}/alpha" in values
        else values[f"{layer}/{kind}/beta"] @ values[f"{layer}/{kind}/gamma"].T
        for layer in layers
    }


def _compressed(
    task: _Finished, backbone: Backbone, shared: Mapping[str, keras.Variable], own: Mapping[str, np.ndarray]
) -> PatchedModel:
    """The task with shared factors in place of its alphas; everything else that it owns as it was."""
    patched = apply_patches(
        backbone,
        task.patched.spec,
        head=task_head.of_objective(task.info.objective, task.info.labels),
        image_size=task.info.image_size,
        shared_head=task.patched.head if task.info.shared_head else None,
        factors=shared,
        dropout=task.info.dropout,
        name=task.name,
    )
    before = task.patched.stored()
    kept = {p.stored_key for p in patched.owned()} - set(own)
    patched.restore({**{key: before[key] for key in kept}, **own}, f"compressed task '{task.name}'")
    return patched


def _write(output: ModelDir, backbone: Backbone, found: Sequence[_Finished], compressed: Mapping[str, PatchedModel]) -> None:
    backbone_files.save(backbone, output.backbone)
    entries: dict[str, Any] = {}
    for task in found:
        patched = compressed[task.name]
        definition, seed = task.folder.read_task(task.name)
        output.write_task(definition, task.info.labels, seed)
        size = write_task(output, task.name, patched, backbone, task.info.labels, task.info.dropout, task.info.objective)
        entries[task.name] = {"steps": 0, **described(patched), "patch_bytes": size}
    ratio = costs.model_size_ratio(backbone, list(compressed.values()))
    atomic.write_json(output.result, {"model_size_ratio": ratio, "tasks": entries})


def _accuracy(folder: ModelDir, task: str) -> float:
    metrics = evaluate(folder.root, task)[task]
    return next(value for name, value in metrics.items() if name not in ("loss", "examples"))


def _finetune(
    output: ModelDir, backbone: Backbone, names: Sequence[str], steps: int, optimizer: OptimizerConfig | None
) -> dict[str, float]:
    again = []
    seed = 0
    for name in names:
        definition, seed = output.read_task(name)
        again.append(dataclasses.replace(definition, init_from=str(output.patch(name)), steps=steps, epochs=None))
    settings = RunSettings(
        model_dir=output.root / FINETUNED, seed=seed, optimizer=optimizer or OptimizerConfig(learning_rate=1e-3)
    )
    result = run(backbone, again, shared_trained=False, settings=settings).summary
    return {name: entry[f"test_{again[i].metric_names[0]}"] for i, (name, entry) in enumerate(result["tasks"].items())}
