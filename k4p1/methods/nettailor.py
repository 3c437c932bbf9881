"""NetTailor: the architecture of a task, tailored in three phases (NT, sections 3.4 and 3.5)."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

from k4p1 import checks, errors
from k4p1.backbones import files as backbone_files
from k4p1.backbones.backbone import Backbone
from k4p1.backbones.blocks import find_blocks
from k4p1.cluster import spec as cluster_spec
from k4p1.files import atomic, tensor_file
from k4p1.files.run_lock import check_usable, run_lock
from k4p1.methods.finetune import finetune
from k4p1.patches import patch_file
from k4p1.patches.apply import apply_patches
from k4p1.patches.patched_model import PatchedModel
from k4p1.patches.spec import PatchSpec
from k4p1.patches.tailored import paths, pruning
from k4p1.patches.tailored.network import TailoredNetwork
from k4p1.runs import tables
from k4p1.runs.evaluate import measure
from k4p1.runs.finalize import described, write_task
from k4p1.runs.model_dir import ModelDir, plain_task
from k4p1.runs.run import RunResult
from k4p1.runs.settings import RunSettings
from k4p1.runs.stages import AS_THE_TASK, Phase, Stages
from k4p1.runs.warm_start import read_teachers
from k4p1.tasks import objectives
from k4p1.tasks.task import Task

KIND = "nettailor"
RANKINGS = ("attention", "random", "last")
_TOLERANCE = 0.005  # half a point (NT, section 4.1)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One pruned network of the sweep.

    Attributes:
      removed: number of main blocks that pruning took.
      accuracy: on the held-out images.
      multiply_adds: live.
      folder: of its run.
    """

    removed: int
    accuracy: float
    multiply_adds: int
    folder: ModelDir


def nettailor(
    *,
    backbone: Backbone | Callable[[], Backbone],
    task: Task,
    model_dir: str | pathlib.Path | None = None,
    teacher: str = "",
    remove: Sequence[int] = (0, 2, 3, 4, 5, 6),
    threshold: float = 0.05,
    ranking: str = "attention",
    complexity: float = 0.3,
    penalty: str = "paper",
    cost: str = "multiply_adds",
    distillation: float = 10.0,
    gradient: str = "local",
    norm: str = "mean",
    teacher_phase: Phase = AS_THE_TASK,
    student_phase: Phase = AS_THE_TASK,
    retrain_phase: Phase = AS_THE_TASK,
    **settings,
) -> RunResult:
    """Trains a teacher, a student with proxies beside every block, and the student again after pruning; keeps the leanest.

    1. Teacher: every parameter fine-tuned (or a finished task in its place).
    2. Student: `cross-entropy + complexity E[C] + distillation Omega` (equation 12); the backbone is frozen.
    3. For each number in `remove`, always from the student of phase 2: the main blocks with the least attention go, proxies
       of at most `threshold` go, and what is not on a way from stem to head; what is left trains again without E[C].

    Of the pruned networks the one with the fewest multiply-adds is kept whose accuracy on held-out images is within
    `max(0.5 points, one standard error)` of the teacher's. The test split is looked at once, at the end.

    Args:
      backbone: pretrained.
      task: that classifies; its patch names `nettailor` with its options.
      model_dir: the tailored task; `stages/` holds the runs on the way, from which an interrupted call resumes.
      teacher: path of the patch file of a finished task that teaches in place of phase 1.
      remove: numbers of main blocks to remove, each a network of the sweep.
      threshold: of the attention of proxies (NT: 0.05).
      ranking: which main blocks go first: those of least `attention`; `random` and `last` are controls.
      complexity, distillation: weights of the terms (NT: 0.3 and 10); 0 leaves a term out.
      penalty, cost: see `k4p1.patches.tailored.complexity`.
      gradient, norm: see `k4p1.tasks.tailoring.BlockLesson`.
      teacher_phase, student_phase, retrain_phase: how each trains.
      **settings: fields of `k4p1.runs.settings.RunSettings`.

    Raises:
      ConfigError, PatchError: settings that cannot be, before anything is trained; or no pruned network is left.
    """
    how = RunSettings.of("nettailor", **settings)
    _check(task, remove, threshold, ranking, complexity, distillation)
    keras.config.set_dtype_policy(how.precision)
    keras.utils.set_random_seed(how.seed)
    network = backbone() if callable(backbone) else backbone
    kind = task.patch.get(KIND)
    blocks = len(find_blocks(network.model, kind.blocks, kind.group))
    for number in remove:
        if number >= blocks:
            raise errors.ConfigError(
                f"nettailor(remove={list(remove)}): the backbone has {blocks} blocks; {number} would leave none, give at "
                f"most {blocks - 1}"
            )
    terms = {objectives.find(task.objective).default_loss: 1.0} if task.loss is None else task.loss
    if not isinstance(terms, Mapping):
        raise errors.ConfigError(f"task '{task.name}': nettailor takes its loss as {{term: weight}}, or None")
    if how.dry_run:
        loss = {**terms, f"complexity(penalty={penalty},cost={cost})": complexity} if complexity else terms
        tailored = student_phase.of(task, loss=loss)
        return finetune(backbone=network, task=tailored, **{**settings, "optimizer": student_phase.optimizer})
    if model_dir is None:
        raise errors.ConfigError("nettailor needs a model_dir: every phase continues from what the one before left there")
    folder = ModelDir(model_dir)
    check_usable(folder.root)
    with run_lock(folder.root):
        described_run = {
            "backbone": network.fingerprint(),
            "task": {**plain_task(task), "schedule": repr(task.schedule), "loss": repr(task.loss)},
            "pruning": [list(remove), threshold, ranking],
            "loss": [complexity, penalty, cost, distillation, gradient, norm],
            "teacher": tensor_file.read_header(pathlib.Path(teacher).expanduser())["content_hash"] if teacher else "",
            "phases": [repr(phase) for phase in (teacher_phase, student_phase, retrain_phase)],
            "seed": how.seed,
        }
        folder.begin(described_run, how.texts(), how.resume)
        stages = Stages(network, task, folder, settings)
        # 1. The teacher.
        if not teacher:
            stages.train("teacher", teacher_phase, patch="full", loss=None)
            teacher = str(stages.folder("teacher").patch(task.name))
        own = f"block_distillation(teacher='{teacher}',gradient={gradient},norm={norm})"
        taught = {**terms, **({own: distillation} if distillation else {})}
        level, images = _teacher_accuracy(task, teacher, how.seed)
        # 2. The student: proxies beside every block.
        priced = {f"complexity(penalty={penalty},cost={cost})": complexity} if complexity else {}
        student = stages.train("student", student_phase, loss={**taught, **priced})
        # 3. The sweep: every number of blocks from the same student.
        candidates = _sweep(stages, student, remove, threshold, ranking, retrain_phase, taught, how.seed)
        # 4. The leanest that is good enough, and one look at the test split.
        chosen = _leanest(candidates, level, images)
        return _finish(stages, chosen, candidates, teacher, (level, images), how)


def _check(task: Task, remove, threshold: float, ranking: str, complexity: float, distillation: float) -> None:
    if cluster_spec.from_environment() is not None:
        raise errors.ConfigError("nettailor runs on one machine; on a cluster, train its phases with k4p1 finetune")
    if task.patch.get(KIND) is None:
        raise errors.ConfigError(f"task '{task.name}': its patch is '{task.patch}'; give one such as 'nettailor(k=3)+head'")
    if task.patch.get(KIND).live:
        raise errors.ConfigError(f"task '{task.name}': nettailor prunes by itself; leave out live= in its patch")
    if objectives.find(task.objective) is not objectives.CLASSIFICATION:
        raise errors.ConfigError(f"task '{task.name}': nettailor tailors tasks that classify; its objective is another one")
    if ranking not in RANKINGS:
        raise errors.ConfigError(errors.unknown("ranking of nettailor", ranking, RANKINGS))
    if not remove:
        raise errors.ConfigError("nettailor(remove=[]): give numbers of blocks to remove, such as [0, 2, 4]")
    for number in remove:
        checks.check_number("nettailor: remove", number, checks.WHOLE)
    if not 0 <= threshold < 1:
        raise errors.ConfigError(f"nettailor(threshold={threshold}): expected an attention in [0, 1)")
    for name, value in {"complexity": complexity, "distillation": distillation}.items():
        checks.check_number(f"nettailor: {name}", value, checks.AT_LEAST_ZERO)


def _teacher_accuracy(task: Task, teacher: str, seed: int) -> tuple[float, int]:
    """The teacher's accuracy on the held-out images, and their number."""
    patched, labels = _teacher(task, teacher)
    metrics = measure(patched, dataclasses.replace(task, loss=None), seed, labels, "validation")
    return metrics[task.metric_names[0]], round(metrics["examples"])


def _teacher(task: Task, teacher: str) -> tuple[PatchedModel, tuple[str, ...]]:
    """The model of the teacher, and its labels."""
    found = read_teachers([dataclasses.replace(task, loss={f"block_distillation(teacher='{teacher}')": 1.0})])[teacher]
    return found.patched, found.labels


def _sweep(
    stages: Stages,
    student: PatchedModel,
    remove: Sequence[int],
    threshold: float,
    ranking: str,
    phase: Phase,
    loss: Mapping[str, float],
    seed: int,
) -> list[Candidate]:
    attention = student.rewiring.attention_now()
    count = len(student.rewiring.blocks)
    order = np.random.default_rng(seed).permutation(np.arange(1, count + 1))
    candidates = []
    for number in sorted(set(remove)):
        removed = {
            "attention": paths.least_attended(attention, number),
            "random": tuple(int(node) for node in order[:number]),
            "last": tuple(range(count - number + 1, count + 1)),
        }[ranking]
        stage = f"removed_{number}"
        folder = stages.folder(stage)
        try:
            live = paths.prune(attention, count, removed, threshold)
        except errors.PatchError as e:
            errors.warn(f"nettailor: {number} blocks cannot be removed: {e}")
            continue
        start = folder.root.with_name(f"{stage}_start.safetensors")
        spec = pruning.pruned_spec(student.spec, live)
        _write_pruned(start, stages, student, spec)
        stages.train(stage, phase, patch=spec, loss=loss, init_from=str(start))
        entry = stages.result(stage)
        accuracy = entry[f"validation_{stages.task.metric_names[0]}"]
        candidates.append(Candidate(number, accuracy, entry["live_multiply_adds"], folder))
    if not candidates:
        raise errors.PatchError(
            f"nettailor(threshold={threshold}): every number of {list(remove)} cuts the network in two; lower the "
            "threshold, or remove fewer blocks"
        )
    return candidates


def _write_pruned(path: pathlib.Path, stages: Stages, student: PatchedModel, spec: PatchSpec) -> None:
    labels = patch_file.read_info(stages.folder("student").patch(stages.task.name)).labels
    pruned = _model(stages, spec, labels)
    pruning.prune_values(student, pruned)
    patch_file.save_patch(path, pruned, stages.backbone, task=stages.task.name, labels=labels, dropout=stages.task.dropout)


def _model(stages: Stages, spec: PatchSpec, labels: Sequence[str]) -> PatchedModel:
    return apply_patches(
        stages.backbone,
        spec,
        classes=len(labels),
        image_size=stages.task.image_size,
        dropout=stages.task.dropout,
        name=stages.task.name,
    )


def _leanest(candidates: Sequence[Candidate], level: float, images: int) -> Candidate:
    """The candidate with the fewest multiply-adds within `max(0.005, sqrt(p (1 - p) / n))` of the teacher."""
    allowed = allowance(level, images)
    good = [one for one in candidates if one.accuracy >= level - allowed]
    if good:
        return min(good, key=lambda one: one.multiply_adds)
    best = max(candidates, key=lambda one: one.accuracy)
    errors.warn(
        f"nettailor: no pruned network is within {allowed:.3f} of the teacher ({level:.3f}); the best has "
        f"{best.accuracy:.3f}, with {best.removed} blocks removed, and is kept"
    )
    return best


def allowance(accuracy: float, images: int) -> float:
    """How far below the teacher a network may be: half a point, or one standard error of the teacher's accuracy."""
    return max(_TOLERANCE, math.sqrt(accuracy * (1.0 - accuracy) / max(images, 1)))


def _finish(
    stages: Stages,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    teacher: str,
    held_out: tuple[float, int],
    how: RunSettings,
) -> RunResult:
    folder, name, backbone = stages.root, stages.task.name, stages.backbone
    patched = patch_file.load_patch(chosen.folder.patch(name), backbone)
    info = patch_file.read_info(chosen.folder.patch(name))
    assert isinstance(patched.rewiring, TailoredNetwork)
    backbone_files.save(backbone, folder.backbone)
    final = dataclasses.replace(stages.task, patch=patched.spec, loss=None, teacher="", init_from="")
    folder.write_task(final, info.labels, how.seed)
    size = write_task(folder, name, patched, backbone, info.labels, final.dropout)
    metric = final.metric_names[0]
    test = {}
    teacher_model, labels = _teacher(stages.task, teacher)
    for who, model, known in (("", patched, info.labels), ("teacher_", teacher_model, labels)):
        measured = measure(model, final, how.seed, known, "test")
        test |= {f"{who}test_{key}": value for key, value in measured.items() if key != "examples"}
    entry = {
        "steps": stages.result(f"removed_{chosen.removed}")["steps"],
        **described(patched),
        "patch_bytes": size,
        f"validation_{metric}": chosen.accuracy,
        "metric": metric,
        "removed_blocks": chosen.removed,
        "teacher_validation": held_out[0],
        "allowed_below_teacher": allowance(*held_out),
        **test,
    }
    sweep = [
        {"removed": one.removed, f"validation_{metric}": one.accuracy, "live_multiply_adds": one.multiply_adds}
        for one in candidates
    ]
    summary = {
        "shared_parameters": patched.rewiring.whole_cost().parameters,
        "shared_trained": False,
        "tasks": {name: entry},
        "sweep": sweep,
    }
    atomic.write_json(folder.result, summary)
    if not how.quiet:
        rows = [(o.removed, f"{o.accuracy:.4f}", f"{o.multiply_adds:,}", "kept" if o is chosen else "") for o in candidates]
        title = f"Sweep of '{name}'; teacher {held_out[0]:.4f} on {held_out[1]:,} held-out images"
        tables.print_rows(title, ("blocks removed", f"validation {metric}", "live multiply-adds", ""), rows)
        tables.print_result(summary)
    return RunResult(summary, {name: patched}, backbone)
