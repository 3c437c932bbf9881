"""The Visual Decathlon: ten tasks, one number (Rebuffi et al. 2017; RA, section 4.1)."""

from collections.abc import Callable, Mapping, Sequence

from k4p1 import errors
from k4p1.backbones.backbone import Backbone
from k4p1.files import atomic
from k4p1.methods.finetune import finetune
from k4p1.runs import tables
from k4p1.runs.model_dir import ModelDir
from k4p1.runs.run import RunResult
from k4p1.tasks.task import Task

FINETUNING = {
    "imagenet12": 59.87,
    "aircraft": 60.34,
    "cifar100": 82.12,
    "daimlerpedcls": 92.82,
    "dtd": 55.53,
    "gtsrb": 97.53,
    "vgg-flowers": 81.41,
    "omniglot": 87.69,
    "svhn": 96.55,
    "ucf101": 51.20,
}
"""Accuracy in percent of the fine-tuned networks that the benchmark compares with, in RA's column order; names of TFDS."""

_POINTS, _POWER = 1000.0, 2


def decathlon_score(accuracies: Mapping[str, float], baseline: Mapping[str, float] | None = None) -> float:
    """`S = sum_t 1000 max(0, 1 - E_t / E_max_t)^2`, E_t the error of task t, E_max_t twice that of the baseline.

    A task at the baseline's accuracy earns 250 points.

    Args:
      accuracies: top-1 accuracy in percent by task.
      baseline: accuracy in percent by task; by default `FINETUNING`, the benchmark's own.

    Raises:
      ConfigError: a task without baseline, or an accuracy outside [0, 100].
    """
    return sum(task_points(accuracies, baseline).values())


def task_points(accuracies: Mapping[str, float], baseline: Mapping[str, float] | None = None) -> dict[str, float]:
    """The points of every task, 0 to 1,000; see `decathlon_score`."""
    baseline = FINETUNING if baseline is None else baseline
    points = {}
    for task, accuracy in accuracies.items():
        if task not in baseline:
            raise errors.ConfigError(errors.unknown("task of the decathlon", task, baseline))
        for what, value in (("accuracy", accuracy), ("baseline", baseline[task])):
            if not 0 <= value <= 100:
                raise errors.ConfigError(f"{what} of task '{task}' is {value}: expected percent, 0 to 100")
        largest = 2.0 * (100.0 - baseline[task])
        share = max(0.0, 1.0 - (100.0 - accuracy) / largest) if largest else float(accuracy == 100.0)
        points[task] = _POINTS * share**_POWER
    return points


def decathlon(
    *,
    backbone: Backbone | Callable[[], Backbone],
    tasks: Sequence[Task],
    baseline: Mapping[str, float] | None = None,
    **settings,
) -> RunResult:
    """Fine-tunes a patch for every task on one frozen backbone and scores them together.

    Tasks earn points for their accuracy on the test split. The benchmark's own test labels are hidden: its validation
    splits stand for them (`k4p1.data.Tfds`). `result.json` gains `decathlon` with points and score.

    Args:
      backbone: pretrained.
      tasks: named as in `baseline`.
      baseline: accuracy in percent of fine-tuned networks by task; by default the benchmark's.
      **settings: fields of `k4p1.runs.settings.RunSettings`.

    Raises:
      ConfigError: a task that the baseline does not name, or that does not measure its accuracy.
    """
    task_points({task.name: 0.0 for task in tasks}, baseline)
    for task in tasks:
        if "accuracy" not in task.metric_names:
            raise errors.ConfigError(
                f"task '{task.name}' has metrics {', '.join(task.metric_names)}; the score needs accuracy"
            )
    result = finetune(backbone=backbone, tasks=tasks, **settings)
    if not result.summary:  # a dry run
        return result
    accuracies = {name: 100.0 * entry["test_accuracy"] for name, entry in result.summary["tasks"].items()}
    points = task_points(accuracies, baseline)
    score = {"score": sum(points.values()), "points": points}
    summary = {**result.summary, "decathlon": score}
    if settings.get("model_dir") is not None:
        atomic.write_json(ModelDir(settings["model_dir"]).result, summary)
    if not settings.get("quiet"):
        rows = [(name, f"{accuracies[name]:.2f}", f"{points[name]:.0f}") for name in points]
        tables.print_rows(f"Decathlon score: {score['score']:.0f}", ("task", "test accuracy (%)", "points"), rows)
    return RunResult(summary, result.models, result.backbone)
