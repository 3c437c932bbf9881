"""Methods of several phases: runs one after another, each of which begins with what the one before left."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from k4p1.backbones.backbone import Backbone
from k4p1.engine.optimizer_config import OptimizerConfig
from k4p1.patches.patched_model import PatchedModel
from k4p1.runs.model_dir import ModelDir
from k4p1.runs.run import run
from k4p1.runs.settings import RunSettings
from k4p1.tasks.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """How long and how one phase trains.

    Attributes:
      epochs, steps: at most one of them; neither: those of the task.
      batch_size: None: that of the task.
      optimizer: of the phase; None: that of the settings.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    optimizer: OptimizerConfig | None = None

    def of(self, task: Task, **changes: Any) -> Task:
        """The task as this phase trains it."""
        if self.steps is not None or self.epochs is not None:
            changes |= {"steps": self.steps, "epochs": self.epochs}
        if self.batch_size is not None:
            changes["batch_size"] = self.batch_size
        return dataclasses.replace(task, **changes)


AS_THE_TASK = Phase()
"""A phase that trains as the task says."""


class Stages:
    """The runs on the way, each in a folder of its own below `stages/`, on one frozen backbone.

    Args:
      backbone: frozen.
      task: of the method; phases change it.
      folder: of the method.
      settings: of the runs, as given to the method.
    """

    def __init__(self, backbone: Backbone, task: Task, folder: ModelDir, settings: Mapping[str, Any]):
        self.backbone, self.task, self.root = backbone, task, folder
        self._settings = {key: value for key, value in settings.items() if key != "dry_run"}

    def folder(self, stage: str) -> ModelDir:
        """Where a stage is."""
        return ModelDir(self.root.root / "stages" / stage)

    def train(self, stage: str, phase: Phase, **changes: Any) -> PatchedModel:
        """The task model that a stage leaves; one that is finished is not trained again."""
        folder = self.folder(stage)
        how = {**self._settings, "model_dir": folder.root, "evaluate_test": False, "linear_probe": False}
        if phase.optimizer is not None:
            how["optimizer"] = phase.optimizer
        task = phase.of(self.task, **changes)
        result = run(self.backbone, [task], shared_trained=False, settings=RunSettings.of(stage, **how))
        return result.models[self.task.name]

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage reports of the task."""
        return json.loads(self.folder(stage).result.read_text(encoding="utf-8"))["tasks"][self.task.name]
