"""Accuracy, parameters and bytes of every method on one backbone: the measurements of docs/methods.md."""

import collections
import dataclasses
import itertools
import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from k4p1 import checks, errors
from k4p1.backbones.backbone import Backbone
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.files import atomic
from k4p1.methods.finetune import finetune
from k4p1.tasks.task import Task

STEPS = {"gtsrb": 1000, "omniglot8": 400, "signdigits": 400, "dtd10": 400}
"""The tasks, and the steps of each at full length."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method trains.

    Attributes:
      patch: patch spec.
      learning_rate: of patch and head.
      mask_rate: learning rate of the scores of its masks.
    """

    patch: str
    learning_rate: float = 1e-2
    mask_rate: float | None = None


METHODS = {
    "head": Method("head"),
    "scale_bias": Method("scale_bias+head"),
    "parallel_adapter": Method("parallel_adapter+scale_bias+head"),
    "series_adapter": Method("series_adapter+scale_bias+head"),
    "mask, BN frozen": Method("mask+head", mask_rate=1e-4),
    "mask, BN private": Method("mask+scale_bias+head", mask_rate=1e-3),
    "lora": Method("lora+scale_bias+head"),
    "dan": Method("dan+scale_bias+head"),
    "full": Method("full", learning_rate=1e-3),
    "series, alpha = 0, BN frozen": Method("series_adapter+head"),
    "series, random alpha, BN frozen": Method("series_adapter(init_std=0.1)+head"),
    "series, random alpha, BN private": Method("series_adapter(init_std=0.1)+scale_bias+head"),
    "series, he alpha, BN frozen": Method("series_adapter(init=he)+head"),
    "series, he alpha, BN private": Method("series_adapter(init=he)+scale_bias+head"),
}
DEFAULT_METHODS = tuple(METHODS)[:9]
_FINGERPRINT_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class _Run:
    """What distinguishes the runs of a results file; the fields are keys of its lines."""

    task: str
    method: str
    seed: int
    steps: int
    rate: float
    mask_rate: float | None

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "_Run":
        """The run of a line; lines of earlier versions do not name the rate of the masks."""
        values = {"mask_rate": METHODS[line["method"]].mask_rate, **line}
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})

    def optimizer(self) -> OptimizerConfig:
        """Adam with cosine decay, and the rate of the masks where there are any."""
        rules = {} if self.mask_rate is None else {"mask": {"learning_rate": self.mask_rate}}
        return OptimizerConfig(learning_rate=self.rate, rules=rules)


def method_table(
    *,
    backbone: Callable[[], Backbone],
    data_dir: str | pathlib.Path,
    results_file: str | pathlib.Path,
    tasks: Sequence[str] = tuple(STEPS),
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = (),
    mask_rate: float | None = None,
    steps_scale: float = 1.0,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Trains every method on every task, one backbone for all, as RA (Table 1) and PB (Tables 2 and 7) compare methods.

    Measured are validation and test accuracy, trained private parameters and bytes of the patch file. All methods have the
    same budget: images of 32 pixels, batches of 32, Adam with cosine decay, random shifts of 4 pixels (`head`: none, its
    features are computed once); 10% of the training images are held out and choose the best of four checkpoints.

    Args:
      backbone: loads the pretrained network; called for every run.
      data_dir: holds prepared TFDS directories, `<task>/1.0.0`.
      results_file: gains one JSON object per line and run; runs that it holds are not repeated. One backbone per file.
      tasks: names in `STEPS`.
      methods: names in `METHODS`.
      seeds: one run each.
      rates: learning rates, one run each, in place of those of the methods.
      mask_rate: learning rate of mask scores in place of those of the methods.
      steps_scale: multiplies the steps of every task.
      quiet: show no progress.

    Returns:
      The results in the file, earlier ones included.

    Raises:
      ConfigError: an unknown task or method, a number out of range, or a file of results on another backbone.
      DataError: a task that is not prepared.
      ArtifactError: a results file that cannot be read.
      StorageError: one that cannot be written.
    """
    path, data_dir = pathlib.Path(results_file).expanduser(), pathlib.Path(data_dir).expanduser()
    results = read_results(path)
    done = set(map(_Run.of, results))
    missing = [run for run in _planned(tasks, methods, seeds, rates, mask_rate, steps_scale) if run not in done]
    if not missing:
        return results
    data = {run.task: data_dir / run.task / "1.0.0" for run in missing}
    for folder in data.values():
        if not (folder / "dataset_info.json").is_file():
            raise errors.DataError(f"no prepared TFDS directory {folder}")
    _check_backbone(backbone, results, path)
    _append(path, "")  # better now than after the first run
    for number, run in enumerate(missing, 1):
        results.append(_measured(run, backbone, data[run.task]))
        _append(path, json.dumps(results[-1]) + "\n")
        if not quiet:
            found = ", ".join(f"{split} {100 * results[-1][f'{split}_accuracy']:.1f}%" for split in ("validation", "test"))
            what = f"{run.task}, {run.method}, seed {run.seed}, rate {run.rate:g}"
            print(f"run {number} of {len(missing)}: {what}: {found}", flush=True)
    return results


def read_results(results_file: str | pathlib.Path) -> list[dict[str, Any]]:
    """The results in a file that `method_table` wrote; none if there is no such file.

    Raises:
      ArtifactError: a line that is not such a result; says which.
    """
    path = pathlib.Path(results_file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as e:
        raise errors.ArtifactError(f"cannot read {path}: {e}") from e
    results = []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            complete = _Run.of(result).task in STEPS and {"test_accuracy", "private_trained", "patch_bytes"} <= set(result)
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise errors.ArtifactError(f"{path}, line {number}: expected a result of 'k4p1 method_table', got {line[:60]!r}")
        results.append(result)
    return results


def markdown(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Tables of results, line by line: one of the runs of full length, one of all others.

    Methods are rows; columns are test accuracy in percent per task and number of steps, mean (lowest to highest) over seeds,
    then trained parameters and bytes on the first task. Learning rates are named where they are not the method's own.
    """
    full = [result for result in results if result["steps"] == STEPS[result["task"]]]
    short = [result for result in results if result["steps"] != STEPS[result["task"]]]
    for title, chosen in (("full length", full), ("other lengths", short)):
        if chosen:
            yield f"{title}:"
            yield from _table(chosen)


def _planned(tasks, methods, seeds, rates, mask_rate, steps_scale) -> list[_Run]:
    """The runs asked for, all of them checked."""
    for what, names, known in (("task", tasks, STEPS), ("method", methods, METHODS)):
        for name in names:
            if name not in known:
                raise errors.ConfigError(errors.unknown(what, name, known))
    checks.check_number("steps_scale", steps_scale, checks.POSITIVE)
    planned = []
    for seed, task, name in itertools.product(seeds, tasks, methods):
        method, steps = METHODS[name], max(1, round(STEPS[task] * steps_scale))
        scores = mask_rate if mask_rate is not None and method.mask_rate is not None else method.mask_rate
        planned += [_Run(task, name, seed, steps, rate, scores) for rate in rates or [method.learning_rate]]
    for run in planned:
        run.optimizer()
    return list(dict.fromkeys(planned))


def _check_backbone(backbone: Callable[[], Backbone], results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    measured = {result["backbone"] for result in results if "backbone" in result}
    if measured and measured != {backbone().fingerprint()[:_FINGERPRINT_DIGITS]}:
        raise errors.ConfigError(f"{path} holds results on another backbone; give another file, or its backbone")


def _measured(run: _Run, backbone: Callable[[], Backbone], data: pathlib.Path) -> dict[str, Any]:
    """Fine-tunes once; what goes into the file."""
    patch = METHODS[run.method].patch
    with tempfile.TemporaryDirectory() as folder:
        result = finetune(
            backbone=backbone,
            task=Task(
                name=run.task,
                data=str(data),
                patch=patch,
                image_size=32,
                batch_size=32,
                steps=run.steps,
                augment="" if patch == "head" else "shift(pixels=4)",
                validation_fraction=0.1,
            ),
            optimizer=run.optimizer(),
            evaluate_every=max(1, run.steps // 4),
            checkpoint_every=10**9,
            model_dir=folder,  # the size of the patch file is measured
            seed=run.seed,
            quiet=True,
        )
    fingerprint = result.backbone.fingerprint()[:_FINGERPRINT_DIGITS]
    return {**dataclasses.asdict(run), "spec": patch, "backbone": fingerprint, **result.summary["tasks"][run.task]}


def _append(path: pathlib.Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        raise atomic.storage_error(path, e) from e


def _table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    accuracies, sizes = collections.defaultdict(list), {}
    for result in results:
        run = _Run.of(result)
        row = (run.method, run.rate, run.mask_rate)
        accuracies[row, (run.task, run.steps)].append(100 * result["test_accuracy"])
        sizes[row, run.task] = [f"{result[size]:,}" for size in ("private_trained", "patch_bytes")]
    columns = sorted({column for _, column in accuracies}, key=lambda column: (list(STEPS).index(column[0]), -column[1]))
    first = columns[0][0]
    yield _line("method", *(f"{task}, {steps:,} steps" for task, steps in columns), f"trained, {first}", f"bytes, {first}")
    yield "|---" * (len(columns) + 3) + "|"
    for row in sorted({row for row, _ in accuracies}, key=lambda row: (list(METHODS).index(row[0]), row[1:])):
        cells = (_accuracy(accuracies.get((row, column))) for column in columns)
        yield _line(_label(*row), *cells, *sizes.get((row, first), ["", ""]))


def _label(method: str, rate: float, mask_rate: float | None) -> str:
    own = METHODS[method]
    rates = (("rate", rate, own.learning_rate), ("mask rate", mask_rate, own.mask_rate))
    return ", ".join([method, *(f"{name} {value:g}" for name, value, default in rates if value != default)])


def _accuracy(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
