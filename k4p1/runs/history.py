"""How the metrics of a run went, in memory."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from k4p1.engine.reporting import Watcher

Columns = dict[str, list[float | None]]


class History(Watcher):
    """Losses and validation metrics of every task by step.

    Args:
      metrics_file: `metrics.jsonl` of the run, whose earlier part is read where the run is resumed; None for none.
    """

    def __init__(self, metrics_file: pathlib.Path | None = None):
        self._rows: dict[str, dict[int, dict[str, float]]] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        if metrics_file is not None and metrics_file.is_file():
            self._read(metrics_file)

    def _read(self, path: pathlib.Path) -> None:
        losses: dict[str, float] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                kind, task, step = record.get("kind"), record.get("task"), record.get("step")
            except (json.JSONDecodeError, AttributeError):
                continue  # the line that a killed process was writing
            if kind == "train":
                losses[task] = record.get("loss")
            elif kind == "eval":
                values = {name: value for name, value in record.items() if name not in ("kind", "task", "step", "time")}
                loss = {"loss": losses[task]} if losses.get(task) is not None else {}
                self._rows.setdefault(task, {})[step] = {**loss, **values}

    def resumed(self, done: Mapping[str, int]) -> None:
        """Forgets what an earlier process did after the checkpoint from which this one goes on."""
        for task, rows in self._rows.items():
            self._rows[task] = {step: row for step, row in rows.items() if step <= done.get(task, 0)}

    def steps(self, done: Mapping[str, int], reports: Sequence[Any]) -> None:
        """Adds up the losses."""
        for report in reports:
            total, count = self._sums.get(report.task, (0.0, 0))
            self._sums[report.task] = (total + report.count * report.loss, count + report.count)

    def evaluated(self, split: str, task: str, step: int, metrics: Mapping[str, float]) -> None:
        """One row: the metrics, and the mean loss since the row before."""
        values = {f"{split}_{name}": value for name, value in metrics.items() if name != "examples"}
        self._rows.setdefault(task, {})[step] = {**self._mean(task), **values}

    def ended(self, done: Mapping[str, int]) -> None:
        """A last row for tasks with steps that no row has."""
        for task in list(self._sums):
            self._rows.setdefault(task, {}).setdefault(done[task], {}).update(self._mean(task))

    def _mean(self, task: str) -> dict[str, float]:
        total, count = self._sums.pop(task, (0.0, 0))
        return {"loss": total / count} if count else {}

    def columns(self) -> dict[str, Columns]:
        """By task: `step`, `loss`, `validation_accuracy`, ..., lists of one length; None where a row lacks a value."""
        found = {}
        for task, rows in self._rows.items():
            ordered = sorted(rows.items())
            names = dict.fromkeys(name for _, row in ordered for name in row)
            found[task] = {"step": [s for s, _ in ordered], **{n: [row.get(n) for _, row in ordered] for n in names}}
        return found
