"""gin files with all that they include, for a folder elsewhere: of a pod, of a job that waits in a queue."""

import copy
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import gin
from k4p1 import errors
from k4p1.cli import gin_files, gin_names
from k4p1.tasks.task import Task

_PATH = re.compile(r"[/~]|\.{1,2}/")
_PATHS = ("data", "data_dir", "teacher", "init_from", "weights", "path")
_TEACHER = re.compile(r"teacher\s*=\s*['\"]?([^'\",)]+)")


def carried(files: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of gin files in one folder, and the texts of all files there, includes too.

    They are read from that folder as working directory.

    Raises:
      ConfigError: two files of one name, or one that includes another by an absolute path.
    """
    names, texts = [], {}
    for file in files:
        path = gin_files.find(file)
        names.append(path.name)
        _carry(path.name, path, texts)
    return names, texts


def _carry(name: str, path: pathlib.Path, texts: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    if texts.get(name, text) != text:
        raise errors.ConfigError(
            f"two gin files are named {name}, {path} is one of them; rename one: they come into one folder"
        )
    texts[name] = text
    for include in gin_names.includes(text):
        if pathlib.PurePath(include).is_absolute() or ".." in pathlib.PurePath(include).parts:
            raise errors.ConfigError(
                f"{path} includes {include!r}, an absolute path or one outside; name a file below its folder"
            )
        if include not in texts:
            _carry(include, gin_files.find(include), texts)


def check_paths(files: Sequence[str], bindings: Sequence[str], mounted: Sequence[str]) -> None:
    """Refuses paths that no pod has.

    Args:
      files: gin files.
      bindings: further bindings.
      mounted: folders that pods have.

    Raises:
      ConfigError: a path outside these folders; names the setting and its place.
    """
    for s in gin_names.effective(list(map(gin_files.find, files)), bindings):
        for value in s.parts(str):
            found = [value, *_TEACHER.findall(value)]
            for path in found:
                named = s.parameter in _PATHS and not path.startswith("embedded") and pathlib.Path(path).exists()
                if (_PATH.match(path) or named) and not any(pathlib.PurePath(path).is_relative_to(m) for m in mounted):
                    raise errors.ConfigError(
                        f"{s.where}: {s.target} is {path!r}, a path that no pod has; pods have {', '.join(mounted)}; put it "
                        "there (--data_claim mounts data), or name a folder of the image by --image_path"
                    )


def tasks_of(command: str) -> list[Task]:
    """The tasks of the configuration that gin holds."""
    tasks, task = setting(command, "tasks"), setting(command, "task")
    return list(tasks or ()) or ([] if task is None else [task])


def setting(command: str, parameter: str) -> Any:
    """A value of the configuration that gin holds, references evaluated; None without one."""
    try:
        return copy.deepcopy(gin.query_parameter(f"{command}.{parameter}"))  # gin evaluates references when it copies
    except ValueError:
        return None
