"""`k4p1 status`: where a run stands."""

import json
import pathlib
import time
from collections.abc import Iterable, Sequence

from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from k4p1 import errors
from k4p1.files import result_file, status_file
from k4p1.runs import run_state
from k4p1.runs.run_state import RunState

SCHEMA = 1
_SILENT_SECONDS = 30.0
_PLAIN_WIDTH = 160


def report(folders: Sequence[pathlib.Path], as_json: bool = False) -> int:
    """Prints where runs stand: one in detail, several as a table, or all as JSON; returns the exit code of the worst state.

    Args:
      folders: of the runs.
      as_json: print one object (docs/operations.md has the schema).

    Raises:
      ArtifactError: a single folder holds no run; among several, and in JSON, that is the state `absent`.
    """
    if len(folders) == 1 and not as_json:
        run = run_state.look(folders[0])
        show(run)
        return run_state.EXIT_CODES[run.state]
    runs = [_look(folder) for folder in folders]
    if as_json:
        print(json.dumps({"schema": SCHEMA, "runs": [run.as_json() for run in runs]}, indent=2))
    else:
        _show_table(runs)
    severity = list(run_state.EXIT_CODES)
    return run_state.EXIT_CODES[max((run.state for run in runs), key=severity.index)]


def _look(folder: pathlib.Path) -> RunState:
    try:
        return run_state.look(folder)
    except errors.ArtifactError as e:
        return RunState(folder, run_state.ABSENT, str(e), None, {})


def _show_table(runs: Sequence[RunState]) -> None:
    rows = [
        (
            str(run.model_dir),
            run.state,
            f"{run.done}/{run.target}" if run.target else "",
            "" if run.last_sign_s is None else f"{_ago(run.last_sign_s)} ago",
            run.reason,
        )
        for run in runs
    ]
    table = rich_table.Table("run", "state", "steps", "last sign", "why", box=None)
    for row in rows:
        table.add_row(*map(rich_text.Text, row))
    console = _console()
    if not console.is_terminal:
        console.width = max(_PLAIN_WIDTH, 10 + sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)))
    console.print(table)


def _console() -> rich_console.Console:
    console = rich_console.Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def show(run: RunState) -> None:
    """Prints state, tasks, workers and the last events of a run."""
    model_dir, status, console = run.model_dir, run.status, _console()
    console.print(_headline(run))
    if not status:
        return
    result = result_file.read(model_dir)["tasks"] if run.state == status_file.FINISHED else {}
    rows = []
    for task, values in status["tasks"].items():
        rows.append(
            (
                task,
                f"{values['done']}/{'?' if values['target'] is None else values['target']}",
                _number(values.get("loss"), ".3f"),
                _number(values.get("steps_per_s"), ".1f"),
                _number(values.get("examples_per_s"), ",.0f"),
                _staleness(values),
                ", ".join(map(str, values.get("workers", []))),
                _text(values["interrupted"]),
                _selecting(result.get(task, {}), values),
            )
        )
    header = ("task", "steps", "loss", "steps/s", "examples/s", "staleness", "workers", "interrupted", "metric")
    _print(console, header, rows)
    rows = [
        (
            name,
            values.get("state", ""),
            ", ".join(values.get("tasks", [])),
            _text(values["steps"]),
            _number(values.get("steps_per_s"), ".1f"),
            _number(values.get("examples_per_s"), ",.0f"),
            _staleness(values),
        )
        for name, values in sorted(status["workers"].items(), key=lambda item: int(item[0]))
    ]
    _print(console, ("worker", "state", "tasks", "steps", "steps/s", "examples/s", "staleness"), rows)
    for owner, values in status.get("owners", {}).items():
        if values.get("missing"):
            console.print(f"{owner}: {values['missing']} updates did not arrive")
    for event in status["events"]:
        console.print(time.strftime("%H:%M:%S", time.localtime(event["time"])), event["text"])


def _headline(run: RunState) -> str:
    line = f"{run.model_dir}: {run.state}"
    if run.state == status_file.TRAINING:
        if run.last_sign_s > _SILENT_SECONDS:
            line += f", last sign of life {_ago(run.last_sign_s)} ago"
    elif run.state in (run_state.STARTING, run_state.WAITING):
        return f"{line}: {run.reason}"
    else:
        line += f" {_ago(run.last_sign_s)} ago" + (f": {run.reason}" if run.reason else "")
    status = run.status
    return f"{line} (process {status['pid']} on {status['host']}, {_ago(status['time'] - status['started'])} long)"


def _ago(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _selecting(result: dict, values: dict) -> str:
    """The selecting metric on the test split of a finished run, else the newest on the validation split."""
    measured = {name: value for name, value in values.items() if name.startswith("validation_") and "_loss" not in name}
    metric = result.get("metric") or next((name.removeprefix("validation_") for name in measured), "accuracy")
    value = result.get(f"test_{metric}", values.get(f"validation_{metric}"))
    return _number(value, ".3f") if metric == "accuracy" or value is None else f"{metric} {value:.3f}"


def _staleness(values: dict) -> str:
    if values["staleness_mean"] is None or values["staleness_max"] is None:
        return ""
    return f"{values['staleness_mean']:.1f}, at most {values['staleness_max']:.0f}"


def _print(console: rich_console.Console, header: Iterable[str], rows: list[tuple[str, ...]]) -> None:
    if not rows:
        return
    shown = [index for index in range(len(rows[0])) if any(row[index] for row in rows)]
    table = rich_table.Table(*[name for index, name in enumerate(header) if index in shown], box=None)
    for row in rows:
        table.add_row(*[row[index] for index in shown])
    console.print(table)
