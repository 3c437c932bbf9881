"""Checkpoints of a run: whole or not there, checked by content hash, the last few and the best."""

import contextlib
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from k4p1 import errors
from k4p1.files import tensor_file

FORMAT = "k4p1-checkpoint"
VERSION = 1
_NAME = re.compile(r"step_(\d+)\.safetensors")
_log = logging.getLogger("k4p1")


class Checkpoint(NamedTuple):
    """A state of training.

    Attributes:
      state: of the store, by name.
      progress: what the training loop keeps: steps of each task, best metric, skipped images.
    """

    state: dict[str, np.ndarray]
    progress: dict


class Checkpoints:
    """The checkpoints of a folder.

    Args:
      folder: made when the first one is written.
      keep: how many of the newest stay; the best is kept apart.
      run: hash of the configuration; checkpoints of another run are refused.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 3, run: str = ""):
        if keep < 1:
            raise errors.ConfigError(f"keep={keep}: at least one checkpoint must stay")
        self._folder, self._keep, self._run = pathlib.Path(folder), keep, run

    @property
    def best_path(self) -> pathlib.Path:
        """Where the joint best checkpoint is."""
        return self._folder / "best.safetensors"

    def paths(self) -> list[pathlib.Path]:
        """The numbered checkpoints, newest first."""
        found = [(int(m[1]), p) for p in self._folder.glob("step_*.safetensors") if (m := _NAME.fullmatch(p.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, step: int, state: Mapping[str, np.ndarray], progress: Mapping) -> pathlib.Path:
        """Writes a checkpoint, then removes the oldest beyond `keep`; the one just written stays in any case."""
        path = self._folder / f"step_{step:08d}.safetensors"
        self._write(path, state, progress)
        for old in [other for other in self.paths() if other != path][self._keep - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def save_best(self, state: Mapping[str, np.ndarray], progress: Mapping) -> None:
        """Replaces the best checkpoint."""
        self._write(self.best_path, state, progress)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None.

        For whoever resumes: says which damaged ones it passed over and renames them to `.damaged`, so that they count no
        more; removes what a killed process was writing.
        """
        for partial in self._folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)
        for path in self.paths():
            try:
                return self.read(path)
            except errors.ArtifactError as e:
                _log.warning("%s; returning to the checkpoint before it", e)
                with contextlib.suppress(OSError):
                    path.rename(path.with_suffix(".damaged"))
        return None

    def best(self) -> Checkpoint | None:
        """The best checkpoint, or None if there is none or it is damaged (which is said)."""
        if not self.best_path.exists():
            return None
        try:
            return self.read(self.best_path)
        except errors.ArtifactError as e:
            _log.warning("%s; continuing without the best checkpoint", e)
            return None

    def read(self, path: pathlib.Path) -> Checkpoint:
        """Reads one.

        Raises:
          ArtifactError: damaged.
          ConfigError: of a run with another configuration.
        """
        tensors, metadata = tensor_file.read(path, FORMAT, VERSION)
        if metadata.get("run", "") != self._run:
            raise errors.ConfigError(
                f"{path} belongs to a run with another configuration; give a new {errors.option('model_dir')}"
            )
        return Checkpoint(tensors, json.loads(metadata["progress"]))

    def _write(self, path: pathlib.Path, state: Mapping[str, np.ndarray], progress: Mapping) -> None:
        metadata = {"progress": json.dumps(progress, sort_keys=True), "run": self._run}
        tensor_file.write(path, FORMAT, VERSION, state, metadata)
