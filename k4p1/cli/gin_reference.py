"""Everything that a gin file can set, as a page: made of the signatures and docstrings of the configurables."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping

from k4p1 import backbones
from k4p1.cli.gin_names import RUN_FUNCTIONS
from k4p1.runs.settings import RunSettings
from k4p1.tasks import Task

OF_THE_COMMAND_LINE = ("model_dir", "resume", "dry_run", "metrics_port", "configuration", "texts")
"""Settings of a run that the command line gives."""

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Examples):$")
_ENTRY = re.compile(r"^  (\*{0,2}\w+(?:, \w+)*): (.*)$")


def page(configurables: Mapping[str, Callable]) -> str:
    """The reference as Markdown, from its first heading on.

    Args:
      configurables: what gin files can name.
    """
    groups: dict[str, list[str]] = {"Runs": [], "Tasks": [], "Backbones": [], "Optimization": []}
    for name, configurable in configurables.items():
        groups[_group(name, configurable)] += _described(name, configurable)
    others = ", ".join(f"`{name}.NAME`" for name in RUN_FUNCTIONS[1:])
    groups["Runs"] += [
        "### Settings of every run",
        "",
        f"In place of `**settings`: `train.NAME = ...`, likewise {others}.",
        "",
        *_table(RunSettings),
    ]
    return "\n".join(line for group, lines in groups.items() for line in (f"## {group}", "", *lines)).rstrip() + "\n"


def _group(name: str, configurable: Callable) -> str:
    if name in RUN_FUNCTIONS:
        return "Runs"
    if configurable is Task:
        return "Tasks"
    return "Backbones" if configurable.__module__.startswith(backbones.__name__) else "Optimization"


def _described(name: str, configurable: Callable) -> list[str]:
    summary = inspect.getdoc(configurable).splitlines()[0]
    return [f"### {name}", "", summary, "", *_table(configurable)]


def _table(configurable: Callable) -> list[str]:
    meanings = dict(_meanings(configurable))
    rows = []
    for parameter in inspect.signature(configurable).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD and "**" + parameter.name not in meanings:
            continue
        if configurable is RunSettings and parameter.name in OF_THE_COMMAND_LINE:
            continue
        if meanings.get(parameter.name, "").startswith("see `k4p1.runs.settings.RunSettings`"):
            continue  # they have a table of their own
        name = ("**" if parameter.kind is parameter.VAR_KEYWORD else "") + parameter.name
        default = "" if parameter.default is parameter.empty else f"`{_default(configurable, parameter)}`"
        meaning = meanings.get(name, "")
        rows.append(f"| `{name}` | {_type(parameter.annotation)} | {default} | {meaning} |")
    return ["| name | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []


def _meanings(configurable: Callable) -> Iterator[tuple[str, str]]:
    """(parameter, meaning) by the docstring; what a class says comes after what its bases say."""
    for documented in reversed(configurable.__mro__) if inspect.isclass(configurable) else [configurable]:
        section, names, text = "", [], ""
        for line in [*(inspect.cleandoc(documented.__doc__ or "")).splitlines(), ""]:
            if (entry := _ENTRY.match(line)) and section in ("Args", "Attributes"):
                yield from ((name, text) for name in names)
                names, text = entry[1].split(", "), entry[2]
            elif line.startswith("    ") and names:
                text += f" {line.strip()}"
            else:
                yield from ((name, text) for name in names)
                names = []
                section = found[1] if (found := _SECTION.match(line)) else section if not line.strip() else ""


def _type(annotation: typing.Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else _name(annotation)
    return f"`{text}`".replace("|", "\\|")


def _name(annotation: typing.Any) -> str:
    if annotation is None or annotation is types.NoneType:
        return "None"
    if annotation is Ellipsis:
        return "..."
    if isinstance(annotation, list):
        return f"[{', '.join(map(_name, annotation))}]"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(map(_name, arguments))
    if origin is not None:
        return f"{_name(origin)}[{', '.join(map(_name, arguments))}]"
    return getattr(annotation, "__name__", str(annotation))


def _default(configurable: Callable, parameter: inspect.Parameter) -> str:
    value = parameter.default
    if dataclasses.is_dataclass(configurable):
        made = {f.name: f.default_factory for f in dataclasses.fields(configurable)}.get(parameter.name)
        value = value if made in (None, dataclasses.MISSING) else made()
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__name__
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    return repr(value).replace("|", "\\|")
