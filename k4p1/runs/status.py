"""`k4p1 status`: where a run stands."""

import pathlib
import time
from collections.abc import Iterable

from rich import console as rich_console
from rich import table as rich_table

from k4p1 import errors
from k4p1.files import result_file, status_file

_SILENT_SECONDS = 30.0
_PLAIN_WIDTH = 160


def show(model_dir: pathlib.Path) -> None:
    """Prints state, tasks, workers and the last events of a run.

    Raises:
      ArtifactError: the folder holds no run.
    """
    if not model_dir.is_dir():
        raise errors.ArtifactError(f"model_dir {model_dir} does not exist")
    status = status_file.read(model_dir)
    if not status:
        raise errors.ArtifactError(f"{model_dir} holds no {status_file.NAME}: no run of k4p1 has begun to train there")
    console = rich_console.Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(_headline(model_dir, status))
    result = result_file.read(model_dir)["tasks"] if status["state"] == status_file.FINISHED else {}
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


def _headline(model_dir: pathlib.Path, status: dict) -> str:
    state, age = status["state"], time.time() - status["time"]
    line = f"{model_dir}: {state}"
    if state in (status_file.FINISHED, status_file.FAILED, status_file.STOPPED):
        line += f" {_ago(age)} ago" + (f": {status['reason']}" if status.get("reason") else "")
    elif age > _SILENT_SECONDS:
        line += f", but no sign of life for {_ago(age)}; the same command resumes from the newest checkpoint"
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
