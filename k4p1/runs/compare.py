"""Runs side by side."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from k4p1 import errors
from k4p1.files import result_file, schema
from k4p1.runs import tables
from k4p1.runs.run import RunResult

_SHOWN = {
    "steps": schema.COUNT,
    "patch": schema.TEXT.or_missing("-"),
    **{name: schema.COUNT.or_none() for name in ("private_trained", "private_statistics", "patch_bytes")},
}

Run = str | pathlib.Path | RunResult


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """The tasks of several runs; it shows itself as a table.

    Attributes:
      rows: of each task a dictionary with `run`, `task` and what `result.json` says of it.
    """

    rows: Sequence[Mapping[str, Any]]

    def __repr__(self) -> str:
        return tables.text_of("", tables.OF_RUNS, self._cells())

    def _repr_html_(self) -> str:
        return tables.html_of("", tables.OF_RUNS, self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        return [(row["run"], *tables.result_cells(row["task"], row, with_patch=True)) for row in self.rows]


def compare(runs: Mapping[str, Run] | Sequence[Run] | Run, *more: Run) -> Comparison:
    """Finished runs in one table: a row per task, with its patch, metrics, parameters and bytes.

    Args:
      runs: folders of runs, or what `train` and `finetune` returned; a mapping gives them names. Folders are called by their
        last part, or whole where two have the same.
      *more: further ones, without names.

    Raises:
      ConfigError: no run, a dry run, or something else than a run.
      ArtifactError: a folder that holds no finished run.
    """
    if isinstance(runs, (str, pathlib.Path, RunResult)):
        runs = [runs]
    elif not isinstance(runs, (Mapping, Sequence)):
        raise errors.ConfigError(f"compare: runs is a {type(runs).__name__}; expected folders of runs, or results")
    if isinstance(runs, Mapping) and more:
        raise errors.ConfigError("compare: give {name: run, ...}, or runs one after another")
    named = dict(runs) if isinstance(runs, Mapping) else _named([*runs, *more])
    if not named:
        raise errors.ConfigError("compare: no run; give folders of finished runs, or results")
    return Comparison([{**entry, "run": name, "task": task} for name, run in named.items() for task, entry in _tasks(run)])


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    names, short = [], []
    for place, run in enumerate(runs, 1):
        path = pathlib.Path(run) if isinstance(run, (str, pathlib.Path)) else None
        names.append(str(path or f"run {place}"))
        short.append(path.name if path else names[-1])
    return dict(zip(short if len(set(short)) == len(short) else names, runs, strict=True))


def _tasks(run: Run) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(run, RunResult):
        if not run.summary:
            raise errors.ConfigError("compare: a dry run has no results")
        return list(run.summary["tasks"].items())
    if not isinstance(run, (str, pathlib.Path)):
        raise errors.ConfigError(f"compare: a run is a {type(run).__name__}; expected the folder of a run, or its result")
    folder = pathlib.Path(run).expanduser()
    tasks = result_file.read(folder)["tasks"]
    if not tasks:
        raise errors.ArtifactError(f"{folder} holds no finished run; see k4p1 status {folder}")
    path = folder / result_file.NAME
    return [(task, schema.check(f"{path}, task {task}", entry, _SHOWN)) for task, entry in tasks.items()]
