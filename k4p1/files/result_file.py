"""`result.json`: what a finished run reached and what it cost."""

import pathlib
from typing import Any

from k4p1.files import schema

NAME = "result.json"

FIELDS = {
    "tasks": schema.object_of(schema.OBJECT).or_missing({}),
    "model_size_ratio": schema.MEASURED.or_none(),
}

TASK_FIELDS = {"metric": schema.TEXT.or_missing("accuracy")}
"""What the entry of a task holds, beside measured numbers."""


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The fields of `result.json`; those of a run that is not finished are empty.

    Raises:
      ArtifactError: it cannot be read, or a field is wrong.
    """
    path = folder / NAME
    if not path.is_file():
        return schema.check(str(path), {}, FIELDS)
    result = schema.read(path, FIELDS)
    for task, entry in result["tasks"].items():
        measured = {name: schema.MEASURED.or_none() for name in entry if name.startswith(("test_", "validation_"))}
        result["tasks"][task] = schema.check(f"{path}, task {task}", entry, {**TASK_FIELDS, **measured})
    return result
