"""The folder of a run: what is where, and loading what a run left."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras

import k4p1
from k4p1 import errors
from k4p1.backbones import files as backbone_files
from k4p1.backbones.backbone import Backbone
from k4p1.data.source import Source
from k4p1.files import atomic, content_hash, result_file, run_record, schema
from k4p1.patches import patch_file
from k4p1.patches.patched_model import PatchedModel
from k4p1.patches.spec import PatchSpec
from k4p1.tasks import objectives
from k4p1.tasks.task import Task

_FORMER_FIELDS = {"start": "init_from", "weight": "turn_weight", "validation": "validation_fraction"}
_REQUIRED_FIELDS = {"name": schema.TASK_NAME, "seed": schema.WHOLE, "patch": schema.TEXT, "data": schema.TEXT}
_TEXTS = ("augment", "objective", "teacher", "init_from", "start")
_FIELDS = {
    **dict.fromkeys(_TEXTS, schema.TEXT),
    "data_dir": schema.TEXT.or_none(),
    "metrics": schema.list_of(schema.TEXT, least=1),
    "loss": schema.Field(
        "text, or weights of terms", lambda v: schema.SCALAR.holds(v) or schema.object_of(schema.NUMBER).holds(v)
    ),
}
"""Fields of `task.json` that `Task` itself does not check."""

_PLAIN_FIELDS = [f.name for f in dataclasses.fields(Task) if f.name != "schedule"]


class ModelDir:
    """Paths of a run, and the check that the folder belongs to it.

    Args:
      root: the folder.
    """

    def __init__(self, root: str | pathlib.Path):
        self.root = pathlib.Path(root).expanduser()
        self.backbone = self.root / "backbone" / "backbone.safetensors"
        self.heads = self.root / "backbone" / "heads"
        self.factors = self.root / "backbone" / "factors"
        self.checkpoints = self.root / "checkpoints"
        self.result = self.root / result_file.NAME
        self._run = self.root / run_record.RUN_FILE

    def task_folder(self, task: str) -> pathlib.Path:
        """Where a task's files are."""
        return self.root / "tasks" / task

    def patch(self, task: str) -> pathlib.Path:
        """A task's patch file."""
        return self.task_folder(task) / "patch.safetensors"

    def begin(
        self, description: Mapping[str, Any], texts: Mapping[str, str], resume: bool = True, may_grow: bool = False
    ) -> str:
        """Starts or resumes a run in this folder and returns its hash.

        Args:
          description: everything that decides what the run computes, plain values.
          texts: further text files of the run by name, such as `config.gin`.
          resume: False puts the checkpoints of an earlier run aside and starts over.
          may_grow: whether a run with more steps than before goes on from the checkpoints of the shorter one.

        Raises:
          ConfigError: the folder holds a run with another configuration; names what differs.
          StorageError: the folder cannot be written.
        """
        description = json.loads(json.dumps(description))
        run = content_hash.digest({}, description)
        before = run_record.read(self.root) if self._run.is_file() else {}
        if resume and may_grow and (told := _grown(before.get("config"), description)):
            run = before.get("config_hash") or run  # its checkpoints stay those of this run
            if any(grown > steps for steps, grown in told.values()):
                grown = ", ".join(
                    f"{task} from {steps} to {new} steps" for task, (steps, new) in told.items() if new > steps
                )
                print(f"{self.root} goes on, {grown}; its learning rates are now those of the longer run")
        elif before.get("config") is not None and before.get("config_hash") != run and resume:
            raise errors.ConfigError(
                f"{self.root} holds a run with another configuration ({_difference(before['config'], description)}); "
                f"give another {errors.option('model_dir')}, or {errors.switched_off('resume')} to start over here"
            )
        if not resume and self.checkpoints.is_dir():
            aside = self.root / f"checkpoints.{int(time.time())}"
            self.checkpoints.rename(aside)
        for name, text in texts.items():
            atomic.write_text(self.root / name, text)
        record = {**before, "config_hash": run, "versions": _versions(), "config": description}
        atomic.write_json(self._run, record)
        return run

    def write_task(self, task: Task, labels: tuple[str, ...], seed: int) -> None:
        """Writes what evaluation needs to open the task's data again."""
        folder = self.task_folder(task.name)
        atomic.write_text(folder / "labels.txt", "\n".join(labels) + "\n")
        atomic.write_json(folder / "task.json", {**plain_task(task), "seed": seed})

    def tasks(self) -> list[str]:
        """The tasks that have a patch file.

        Raises:
          ArtifactError: the folder holds no finished run.
        """
        found = sorted(path.parent.name for path in self.root.glob("tasks/*/patch.safetensors"))
        if not found:
            what = "holds no finished task" if self.root.is_dir() else "does not exist"
            raise errors.ArtifactError(f"model_dir {self.root} {what}; train first")
        return found

    def chosen_tasks(self, task: str | None) -> list[str]:
        """`task` alone, or all tasks.

        Raises:
          ConfigError: no such task; the nearest name is shown.
        """
        known = self.tasks()
        if task is None:
            return known
        if task not in known:
            raise errors.ConfigError(errors.unknown(f"task of {self.root}", task, known))
        return [task]

    def one_task(self, task: str | None) -> str:
        """`task`, or the only task of the run.

        Raises:
          ConfigError: no such task, or several and none is named.
        """
        names = self.chosen_tasks(task)
        if len(names) > 1:
            raise errors.ConfigError(
                f"{self.root} has several tasks; say which with {errors.option('task')}: {', '.join(names)}"
            )
        return names[0]

    def read_task(self, name: str) -> tuple[Task, int]:
        """A task as it was trained, and the seed of its run; `data` is empty if it was a Python object."""
        path = self.task_folder(name) / "task.json"
        values = schema.read(path, _REQUIRED_FIELDS)
        values = schema.check(str(path), values, {field: what for field, what in _FIELDS.items() if field in values})
        seed = values.pop("seed")
        try:
            return task_of(values), seed
        except (errors.ConfigError, TypeError) as e:  # TypeError: a field that no task has
            raise errors.ArtifactError(f"{path}: {str(e).splitlines()[0]}") from e

    def read_result(self) -> dict[str, Any]:
        """What a finished run reached; empty fields for one that is not finished."""
        return result_file.read(self.root)

    def load_backbone(self) -> Backbone:
        """The run's backbone."""
        return backbone_files.load(self.backbone)

    def load_task(self, name: str, backbone: Backbone | None = None) -> PatchedModel:
        """The task model of a finished task."""
        self.chosen_tasks(name)
        return patch_file.load_patch(self.patch(name), backbone or self.load_backbone(), self.heads, self.factors)


def _grown(before: Any, now: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(steps before, steps now) by task, where two runs differ in steps that have grown, or in nothing; else empty."""
    if not isinstance(before, Mapping) or not isinstance(before.get("tasks"), list):
        return {}
    tasks = before["tasks"], now.get("tasks", [])
    known = [all(isinstance(task, Mapping) and isinstance(task.get("steps"), int) for task in side) for side in tasks]
    without = [[{**task, **dict.fromkeys(("steps", "epochs"))} for task in side] for side in tasks] if all(known) else []
    if not without or {**before, "tasks": without[0]} != {**now, "tasks": without[1]}:
        return {}
    steps = {new["name"]: (old["steps"], new["steps"]) for old, new in zip(*tasks, strict=True)}
    return steps if all(old <= new for old, new in steps.values()) else {}


def with_labels(model: keras.Model, labels: Sequence[str]) -> keras.Model:
    """The model with its class names as the attribute `labels`."""
    model.labels = tuple(labels)
    return model


def plain_task(task: Task) -> dict[str, Any]:
    """The fields of a task as plain values; what is a Python object is left out, data becomes an empty string."""
    values = {name: getattr(task, name) for name in _PLAIN_FIELDS}
    objective = task.objective if isinstance(task.objective, str) else task.objective.name
    named = [one for one in task.metrics if isinstance(one, str)]
    plain = {
        "data": "" if isinstance(task.data, Source) else task.data,
        "metrics": named or list(objectives.find(task.objective).default_metrics),
        "augment": task.augment if isinstance(task.augment, str) else "",
        "loss": None if of_python(task.loss) else task.loss,
    }
    if task.class_weight is None:
        values.pop("class_weight")  # as in files of version 0.1
    return {**values, **plain, "patch": str(task.patch), "objective": objective}


def of_python(loss: Any) -> bool:
    """Whether a loss is, or names, a function or an object of Keras."""
    return callable(loss) or (isinstance(loss, Mapping) and any(map(callable, loss)))


def task_of(values: Mapping[str, Any]) -> Task:
    """The task of plain values, those of earlier versions included: fields by their former names, former patch options."""
    renamed = {_FORMER_FIELDS.get(name, name): value for name, value in values.items()}
    return Task(**{**renamed, "patch": PatchSpec.parse(renamed["patch"], stored=True)})


def _versions() -> dict[str, str]:
    import keras
    import numpy as np
    import tensorflow as tf

    return {"k4p1": k4p1.__version__, "tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}


def _difference(before: Any, now: Any, path: str = "") -> str:
    """The first place in which two descriptions differ."""
    if isinstance(before, dict) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            if before.get(key) != json.loads(json.dumps(now.get(key))):
                return _difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    if isinstance(before, list) and isinstance(now, (list, tuple)) and len(before) == len(now):
        for index, (a, b) in enumerate(zip(before, now, strict=True)):
            if a != json.loads(json.dumps(b)):
                return _difference(a, b, f"{path}[{index}]")
    return f"{path}: {str(before)[:60]} there, {str(now)[:60]} now"
