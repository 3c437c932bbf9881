"""What decides what a run computes, as plain values: two runs are the same run if these are equal."""

from collections.abc import Mapping, Sequence
from typing import Any

from k4p1.backbones.backbone import Backbone
from k4p1.files import tensor_file
from k4p1.runs.model_dir import of_python, plain_task
from k4p1.runs.settings import RunSettings
from k4p1.tasks import attached_terms, python_objects
from k4p1.tasks.prepare import PreparedTask
from k4p1.tasks.task import Task

_SETTINGS = ("seed", "recalibration_batches", "precision", "cache_features", "refit", "jit_compile", "evaluate_every")
_LATER = {"backbone_normalisation": "pooled", "statistics_of_shared": "pooled"}
"""Settings that earlier runs did not have: named only where they differ, so that those are still resumed."""
_WHO_COMPUTES = ("workers", "worker_share")


def describe(
    backbone: Backbone, prepared: Sequence[PreparedTask], shared_trained: bool, settings: RunSettings
) -> dict[str, Any]:
    """Everything that decides what the run computes, as plain values."""
    return {
        "backbone": {"name": backbone.name, "config": _plain(backbone.config), "fingerprint": backbone.fingerprint()},
        "tasks": [
            {**_computed(t.task), "schedule": repr(t.task.schedule), "steps": t.steps, "labels": list(t.labels)}
            for t in prepared
        ],
        "optimizer": repr(settings.optimizer),
        "shared_trained": shared_trained,
        **{name: getattr(settings, name) for name in _SETTINGS},
        **{name: getattr(settings, name) for name, default in _LATER.items() if getattr(settings, name) != default},
    }


def _computed(task: Task) -> dict[str, Any]:
    """The plain fields of a task without those that say who computes it; of files, their content."""
    plain = {name: value for name, value in plain_task(task).items() if name not in _WHO_COMPUTES}
    teachers = [term.options["teacher"] for term in task.terms if term.name in attached_terms.WITH_TEACHER]
    files = {"init_from": task.init_from, **{f"teacher_{number}": path for number, path in enumerate(teachers)}}
    plain.pop("teacher", None)
    if task.class_weight:
        plain["class_weight"] = {str(label): weight for label, weight in task.class_weight.items()}
    python = {
        "loss": [term.name for term in task.terms] if of_python(task.loss) else [],
        "metrics": list(task.metric_names) if not all(isinstance(one, str) for one in task.metrics) else [],
        "augment": [python_objects.name_of(task.augment)] if callable(task.augment) else [],
    }
    plain |= {f"python_{what}": names for what, names in python.items() if names}
    return {**plain, **{name: tensor_file.read_header(path)["content_hash"] for name, path in files.items() if path}}


def _plain(config: Mapping[str, Any]) -> Any:
    return {key: value if key != "keras_model" else "given" for key, value in config.items()}
