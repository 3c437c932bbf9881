"""Are the values of gin's bindings of the types that they should have? gin itself does not look.

Bindings are read a second time, with the file and line of each, and compared with the annotations of what they configure.
"""

import collections.abc
import dataclasses
import functools
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser
from k4p1 import errors
from k4p1.cli import gin_files
from k4p1.runs.settings import RunSettings

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text in quotes", type(None): "None"}
_LISTS = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


class _Reference:
    """What `@configurable` gives: of any type."""


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return _Reference()

    def macro(self, macro_name):
        return _Macro(macro_name)


def check_types(files: Sequence[pathlib.Path], bindings: Sequence[str], configurables: Mapping[str, Callable]) -> None:
    """Makes sure that every value has a type that its parameter can have.

    Args:
      files: gin files, which gin could read.
      bindings: further bindings.
      configurables: what they configure, by name.

    Raises:
      ConfigError: a value of another type; names the binding, where it is, and what is expected.
    """
    statements = [s for file in files for s in _statements(file)]
    for binding in bindings:
        statements += [("--gin_bindings", s) for s in _parsed(binding)]
    macros = {s.selector: (where, s) for where, s in statements if not s.arg_name}
    last = {(s.scope, s.selector.rpartition(".")[2], s.arg_name): (where, s) for where, s in statements if s.arg_name}
    for (scope, name, parameter), (where, statement) in last.items():
        hint = _hints(configurables[name]).get(parameter, Any) if name in configurables else Any
        value, of_macro = _resolved(statement.value, macros), None
        if isinstance(statement.value, _Macro) and statement.value.name in macros:
            where, of_macro = macros[statement.value.name]
        if _fits(value, hint):
            continue
        target = f"{scope}/{name}.{parameter}" if scope else f"{name}.{parameter}"
        given = f"{of_macro.selector} = {value!r}" if of_macro else f"{target} = {value!r}"
        for_what = f" for {target}" if of_macro else ""
        raise errors.ConfigError(f"{where}: {given}; expected {_words(hint)}{for_what}")


def _statements(file: pathlib.Path) -> Iterator[tuple[str, config_parser.BindingStatement]]:
    """(file and line, statement) of a file and of those that it includes, in order."""
    for statement in _parsed(file.read_text(encoding="utf-8"), file):
        if isinstance(statement, config_parser.IncludeStatement):
            yield from _statements(gin_files.find(statement.filename))
        else:
            yield f"{file}, line {statement.location.line_num}", statement


def _parsed(text: str, file: pathlib.Path | None = None) -> list[Any]:
    kinds = (config_parser.BindingStatement, *([config_parser.IncludeStatement] if file else []))
    return [s for s in config_parser.ConfigParser(text, _Delegate()) if isinstance(s, kinds)]


def _resolved(value: Any, macros: Mapping[str, tuple[str, Any]]) -> Any:
    """A value with its macros replaced; one without a value stands for anything."""
    if isinstance(value, _Macro):
        return _resolved(macros[value.name][1].value, macros) if value.name in macros else _Reference()
    if isinstance(value, Mapping):
        return {key: _resolved(v, macros) for key, v in value.items()}
    return type(value)(_resolved(v, macros) for v in value) if isinstance(value, (list, tuple)) else value


@functools.cache
def _hints(function: Callable) -> dict[str, Any]:
    """Types of parameters by name; run functions take the fields of `RunSettings`, too."""
    is_class = inspect.isclass(function) and not dataclasses.is_dataclass(function)
    hints = typing.get_type_hints(function.__init__ if is_class else function)
    further = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    is_run = further and function.__module__.startswith("k4p1.methods.")
    own = {name: hint for name, hint in hints.items() if name not in (*further, "return")}
    return {**(typing.get_type_hints(RunSettings) if is_run else {}), **own}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may be given where a type is expected; what is not told apart here may."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, _Reference) or hint is Any or isinstance(hint, (typing.TypeVar, str)):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if (origin or hint) in _LISTS:
        item = inner[0] if inner else Any
        return isinstance(value, (list, tuple)) and all(_fits(v, item) for v in value)
    if (origin or hint) in _MAPPINGS:
        return isinstance(value, Mapping) and all(_fits(v, inner[1] if len(inner) > 1 else Any) for v in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _WORDS else False  # what else there is, only a reference gives


def _words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, inner)))
    if (origin or hint) in _LISTS:
        return f"a list, each {_words(inner[0])}" if inner and inner[0] is not Any else "a list"
    if (origin or hint) in _MAPPINGS:
        return "a dictionary"
    return _WORDS.get(hint, "a reference such as @name")
