"""Do the names in gin files mean what their author thinks? Scopes, tasks without data, settings written as macros.

gin accepts any scope and any macro. The files are read a second time, with the place of each statement.
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser
from k4p1 import errors
from k4p1.cli import gin_files
from k4p1.runs.settings import RunSettings

RUN_FUNCTIONS = ("train", "finetune", "decathlon", "packnet")
"""The configurables that take the settings of a run."""

_COMMAND_LINE = "--gin_bindings"


@dataclasses.dataclass(frozen=True)
class _Reference:
    """`@scope/name` or `@scope/name()`."""

    scope: str
    name: str
    text: str


class _Macro(str):
    """`%name`."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """`scope/name.parameter = value`; without a parameter, a macro."""

    scope: str
    name: str
    parameter: str
    value: Any
    where: str

    @property
    def target(self) -> str:
        """What is set."""
        path = f"{self.scope}/{self.name}" if self.scope else self.name
        return f"{path}.{self.parameter}" if self.parameter else path

    def parts(self, kind: type) -> list[Any]:
        """What the value holds of a kind, such as text."""
        return [part for part in _flat(self.value) if isinstance(part, kind)]


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        scope, _, name = scoped_configurable_name.rpartition("/")
        return _Reference(scope, name.rpartition(".")[2], f"@{scoped_configurable_name}{'()' if evaluate else ''}")

    def macro(self, macro_name):
        return _Macro(macro_name)


def check_names(files: Sequence[pathlib.Path], bindings: Sequence[str], configurables: Mapping[str, Callable]) -> None:
    """Refuses names that gin lets pass and that mean nothing.

    Args:
      files: gin files, which gin could read.
      bindings: further bindings, likewise.
      configurables: what they configure, by name.

    Raises:
      ConfigError: a scope that nothing refers to or for which nothing is set, a task without data or name, an unknown
        setting of a run, a setting without its function; with the place and the nearest name.
    """
    statements = _read(files, bindings)
    _check_scopes(statements)
    last = _last(statements)
    _check_settings(last, configurables)
    _check_macros(last, configurables)
    _check_tasks(last, configurables)


def effective(files: Sequence[pathlib.Path], bindings: Sequence[str]) -> list[Statement]:
    """The statements of files and bindings that no later one replaces."""
    return _last(_read(files, bindings))


def includes(text: str) -> list[str]:
    """The files that the text of a gin file includes, as it names them."""
    parser = config_parser.ConfigParser(text, _Delegate())
    return [s.filename for s in parser if isinstance(s, config_parser.IncludeStatement)]


def _read(files: Sequence[pathlib.Path], bindings: Sequence[str]) -> list[Statement]:
    statements = [s for file in files for s in _statements(file.read_text(encoding="utf-8"), str(file))]
    return statements + [s for binding in bindings for s in _statements(binding, _COMMAND_LINE)]


def _last(statements: Sequence[Statement]) -> list[Statement]:
    return list({s.target: s for s in statements}.values())


def _check_scopes(statements: Sequence[Statement]) -> None:
    """Statements that later ones replace count, too: what is set for a task that a run leaves out is not misspelt."""
    bound = {s.scope for s in statements if s.scope}
    referred = {scope for s in statements for r in s.parts(_Reference) for scope in _prefixes(r.scope)}
    for s in statements:
        for reference in s.parts(_Reference):
            if reference.scope and not bound & set(_prefixes(reference.scope)):
                raise errors.ConfigError(
                    f"{s.where}: {s.target} names {reference.text}, and nothing is set for '{reference.scope}'; "
                    f"{errors.nearest(reference.scope, bound)}Known: {_listed(bound)}"
                )
    for s in statements:
        if s.scope and s.scope not in referred:
            raise errors.ConfigError(
                f"{s.where}: {s.target} is for '{s.scope}', to which nothing refers; "
                f"{errors.nearest(s.scope, referred)}Known: {_listed(referred)}"
            )


def _check_settings(statements: Sequence[Statement], configurables: Mapping[str, Callable]) -> None:
    for s in statements:
        if s.name in RUN_FUNCTIONS and s.parameter:
            known = parameters(s.name, configurables[s.name])
            if s.parameter not in known:
                raise errors.ConfigError(f"{s.where}: {errors.unknown(f'setting of {s.name}', s.parameter, known)}")


def _check_macros(statements: Sequence[Statement], configurables: Mapping[str, Callable]) -> None:
    used = {macro.rpartition("/")[2] for s in statements for macro in s.parts(_Macro)}
    active = {s.name for s in statements if s.parameter} | {r.name for s in statements for r in s.parts(_Reference)}
    settings: dict[str, str] = {}
    for name in sorted(active & set(configurables), key=lambda name: (name not in RUN_FUNCTIONS, name != "Task", name)):
        for parameter in parameters(name, configurables[name]):
            settings.setdefault(parameter, f"{name}.{parameter}")
    for s in statements:
        if s.parameter or s.name in used:
            continue
        if s.name in settings:
            raise errors.ConfigError(
                f"{s.where}: '{s.name}' is no macro of this configuration; as a setting, write {settings[s.name]} = ..."
            )
        if not errors.nearest(s.name, used) and (close := errors.nearest(s.name, settings)):
            meant = settings[close.split("'")[1]]
            raise errors.ConfigError(f"{s.where}: unused macro '{s.name}'; did you mean '{meant}'?")


def _check_tasks(statements: Sequence[Statement], configurables: Mapping[str, Callable]) -> None:
    signature = inspect.signature(configurables["Task"]).parameters.values()
    needed = [p.name for p in signature if p.default is inspect.Parameter.empty]
    given = {(s.scope, s.parameter) for s in statements if s.name == "Task"}
    for s in statements:
        for reference in s.parts(_Reference):
            for field in needed if reference.name == "Task" else ():
                if not any((scope, field) in given for scope in ["", *_prefixes(reference.scope)]):
                    path = reference.text.strip("@()")
                    raise errors.ConfigError(
                        f"{s.where}: {s.target} names {reference.text}, a task without {field}; add {path}.{field} = '...'"
                    )


def parameters(name: str, configurable: Callable) -> list[str]:
    """The parameters of a configurable; those of a run function include the settings of a run."""
    every = inspect.signature(configurable).parameters.values()
    named = [p.name for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return named + ([f.name for f in dataclasses.fields(RunSettings)] if name in RUN_FUNCTIONS else [])


def _statements(text: str, where: str) -> Iterator[Statement]:
    for s in config_parser.ConfigParser(text, _Delegate()):
        if isinstance(s, config_parser.IncludeStatement):
            path = gin_files.find(s.filename)
            yield from _statements(path.read_text(encoding="utf-8"), str(path))
        elif isinstance(s, config_parser.BindingStatement):
            place = where if where == _COMMAND_LINE else f"{where}, line {s.location.line_num}"
            yield Statement(s.scope, s.selector.rpartition(".")[2], s.arg_name, s.value, place)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(key)
            yield from _flat(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _prefixes(scope: str) -> list[str]:
    """`a`, `a/b` for `a/b`: the scopes whose bindings hold there."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
