"""What a patch file says about itself, as it is written and as it may be read (docs/patch_file.md)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from k4p1 import errors, spec_grammar
from k4p1.backbones import input_scaling
from k4p1.files import schema
from k4p1.patches import kind as patch_kind
from k4p1.patches import task_head
from k4p1.patches.spec import PatchSpec

_MOST_PIXELS = 65_535

FIELDS = {
    "task": schema.TASK_NAME,
    "spec": schema.TEXT,
    "options": schema.object_of(schema.object_of(schema.SCALAR)).or_missing({}),
    "labels": schema.list_of(schema.TEXT, least=1),
    "image_size": schema.Field(
        f"height and width in pixels, at most {_MOST_PIXELS}",
        lambda value: (
            schema.list_of(schema.COUNT).holds(value) and len(value) == 2 and 0 < min(value) <= max(value) <= 65_535
        ),
    ),
    "dropout": schema.SHARE,
    "scaling": schema.one_of(input_scaling.SCALINGS),
    "backbone": schema.TEXT,
    "fingerprint": schema.HASH,
    "structure": schema.HASH,
    "shared_head": schema.HASH_OR_EMPTY,
    "factors": schema.HASH_OR_EMPTY.or_missing(""),
    "k4p1_version": schema.TEXT,
    "objective": schema.TEXT.or_missing(task_head.DEFAULT_OBJECTIVE),
    "structure_version": schema.COUNT.or_missing(1),
}
"""The fields of the metadata `patch`."""


@dataclasses.dataclass(frozen=True)
class PatchInfo:
    """What a patch file says about itself.

    Attributes:
      task: name of the task.
      spec: the patch spec.
      labels: class names.
      image_size: (height, width) in pixels.
      dropout: rate before the head, in training.
      scaling: of the backbone's input.
      backbone: its name.
      fingerprint: of the backbone.
      structure: hash of the backbone's structure.
      shared_head: fingerprint of the head that the task shares, or an empty string.
      factors: fingerprint of the adapter factors that the task shares, or an empty string.
      k4p1_version: that wrote the file.
      objective: name of the task's objective, which makes the head.
      structure_version: of the description of structure behind both hashes (`k4p1.backbones.structure`).
    """

    task: str
    spec: PatchSpec
    labels: tuple[str, ...]
    image_size: tuple[int, int]
    dropout: float
    scaling: str
    backbone: str
    fingerprint: str
    structure: str
    shared_head: str
    k4p1_version: str
    factors: str = ""
    objective: str = task_head.DEFAULT_OBJECTIVE
    structure_version: int = 1

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], what: str = "the patch file") -> "PatchInfo":
        """Reads the metadata of a patch file.

        Args:
          metadata: of the file.
          what: its path, for messages.

        Raises:
          ArtifactError: a field that is missing or wrong; names it.
        """
        described = schema.check(what, metadata, {"patch": schema.TEXT})["patch"]
        values = schema.check(what, schema.parse(f"the description in {what}", described), FIELDS)
        values["labels"], values["image_size"] = tuple(values["labels"]), tuple(values["image_size"])
        values["spec"] = _stored_spec(values["spec"], values["options"], what)
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def as_metadata(self) -> dict[str, str]:
        """The inverse of `from_metadata`; an objective is named where it is not classification."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.objective == task_head.DEFAULT_OBJECTIVE:
            del values["objective"]
        values |= {"spec": str(self.spec), "options": self.spec.options()}
        return {"patch": json.dumps(values, sort_keys=True)}


def check_labels(outputs: Any, labels: Sequence[str], objective: str) -> None:
    """Raises ConfigError unless there is a label for each logit, where a task classifies.

    Args:
      outputs: of a task model: its `output`.
      labels: class names.
      objective: name of the task's objective.
    """
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
        raise errors.ConfigError(f"labels are {labels!r}; expected a sequence of names")
    if objective == task_head.DEFAULT_OBJECTIVE and not isinstance(outputs, dict) and outputs.shape[-1] != len(labels):
        raise errors.ConfigError(
            f"{len(labels)} labels ({', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''}) for a task model of "
            f"{outputs.shape[-1]} classes; give one label per class"
        )


def _stored_spec(text: str, options: Mapping[str, Mapping[str, Any]], what: str) -> PatchSpec:
    """The spec of a file: every option as it was when the file was written, whatever its default is today."""
    try:
        spec = PatchSpec.parse(text, stored=True, recorded=options)
        named = {} if text.strip() == "none" else dict(spec_grammar.parse(text))
        for name in options:
            if name not in named:
                raise errors.PatchError(f"it has options of a kind '{name}' that its spec does not name")
        return PatchSpec(tuple(_with_stored(kind, named[kind.name], options.get(kind.name, {})) for kind in spec.kinds))
    except errors.PatchError as e:
        raise errors.ArtifactError(
            f"{what} has a spec {text[:60]!r} that cannot be used: {e} (kinds of your own: {errors.imported()})"
        ) from e


def _with_stored(kind: patch_kind.PatchKind, named: Mapping[str, str], stored: Mapping[str, Any]) -> patch_kind.PatchKind:
    today = {kind.renamed_options.get(option, option): value for option, value in stored.items()}
    names = {kind.renamed_options.get(option, option) for option in named}
    known = kind.options()
    for option, value in today.items():
        if option not in known:
            raise errors.PatchError(errors.unknown(f"option of patch kind '{kind.name}'", option, known))
        expected = type(known[option])
        if expected is float and type(value) is int:
            today[option] = value = float(value)
        if type(value) is not expected:
            raise errors.PatchError(f"{kind.name}({option}={value!r}): expected {expected.__name__}")
        if option in names and getattr(dataclasses.replace(kind, **{option: value}), option) != known[option]:
            raise errors.PatchError(f"{kind.name}({option}={known[option]}): its stored options say {value}")
    return type(kind)(**{**known, **today})
