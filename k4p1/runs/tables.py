"""Tables of a run for people."""

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import console as rich_console
from rich import table as rich_table

from k4p1.engine.groups import ParameterGroup
from k4p1.patches.patched_layer import FIXED, STATISTICS, TRAINED
from k4p1.patches.patched_model import PRIVATE, SHARED
from k4p1.tasks.prepare import PreparedTask


def print_parameters(prepared: Sequence[PreparedTask]) -> None:
    """Parameter values of every task: shared, private trained, private fixed, statistics."""
    table = _table("Parameters", "task", "patch", "shared", "private trained", "private fixed", "private statistics")
    for task in prepared:
        count = task.patched.count
        shared = count(SHARED, TRAINED, FIXED, STATISTICS)
        private = (count(PRIVATE, role) for role in (TRAINED, FIXED, STATISTICS))
        table.add_row(task.name, str(task.patched.spec), *(f"{n:,}" for n in (shared, *private)))
    _print(table)


def print_updates(groups: Sequence[ParameterGroup], frozen: Mapping[str, int]) -> None:
    """Learning rate, optimizer and weight decay of every group of trained parameters, each with the rule that won;
    and how many values rules freeze, by rule."""
    table = _table("Update rules", "group", "values", "learning rate", "optimizer", "weight decay")
    for group in groups:
        rates: dict[tuple[float, str], list[str]] = {}
        for task, update in group.updates.items():
            sources = [update.sources[name] for name in ("learning_rate", "rate_factor") if name in update.sources]
            rates.setdefault((update.rate, " x ".join(sources)), []).append(task)
        if rates:
            several = len(rates) > 1
            shown = [f"{rate:g} ({why})" + (f" for {', '.join(t)}" if several else "") for (rate, why), t in rates.items()]
            optimizer = f"{type(group.update.optimizer).__name__} ({group.update.sources['optimizer']})"
            decay = f"{group.update.weight_decay:g} ({group.update.sources['weight_decay']})"
            table.add_row(group.name, f"{group.packing.size:,}", "; ".join(shown), optimizer, decay)
    for source, size in frozen.items():
        table.add_row("frozen", f"{size:,}", f"none ({source})", "", "")
    _print(table)


_OF_RESULT = ("task", "steps", "validation", "test", "private trained", "statistics", "patch bytes")
OF_RUNS = ("run", "task", "patch", *_OF_RESULT[1:])
"""Columns of a comparison of runs."""


def print_result(result: Mapping[str, Any]) -> None:
    """The selecting metric (accuracy of tasks that classify), parameters and bytes of every task of a finished run."""
    _print(_filled(_title(result), _OF_RESULT, _result_rows(result)))


def result_text(result: Mapping[str, Any]) -> str:
    """What `print_result` prints."""
    return text_of(_title(result), _OF_RESULT, _result_rows(result))


def result_html(result: Mapping[str, Any]) -> str:
    """The same as an HTML table."""
    return html_of(_title(result), _OF_RESULT, _result_rows(result))


def result_cells(name: str, task: Mapping[str, Any], with_patch: bool = False) -> tuple[str, ...]:
    """A row of such a table: a task and its entry of `result.json`."""
    measured = (task.get(f"{split}_{task.get('metric', 'accuracy')}") for split in ("validation", "test"))
    counts = ("private_trained", "private_statistics", "patch_bytes")
    return (
        name,
        *((str(task.get("patch", "-")),) if with_patch else ()),
        f"{task['steps']:,}",
        *("-" if a is None else f"{a:.3f}" for a in measured),
        *("-" if task.get(key) is None else f"{task[key]:,}" for key in counts),
    )


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['shared_parameters']:,} shared parameters"


def _result_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [result_cells(name, task) for name, task in result["tasks"].items()]


def text_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text, 120 characters wide."""
    console = rich_console.Console(width=120, file=io.StringIO(), markup=False, emoji=False)
    console.print(_filled(title, columns, rows))
    return console.file.getvalue().rstrip()


def html_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as HTML."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(value)}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Any table."""
    _print(_filled(title, columns, rows))


def _filled(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> rich_table.Table:
    table = _table(title, *columns)
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _table(title: str, *columns: str) -> rich_table.Table:
    table = rich_table.Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _print(table: rich_table.Table) -> None:
    plain = {"markup": False, "emoji": False}  # names of tasks, labels and paths are text
    console = rich_console.Console(**plain)
    if not console.is_terminal:
        console = rich_console.Console(width=120, **plain)
    console.print(table)
