"""What the coordinator says of its run in `run.json` before it waits for its cluster, and servers and workers compare."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import k4p1
from k4p1 import errors
from k4p1.files import atomic, schema

RUN_FILE = "run.json"

FIELDS = {
    "versions": schema.object_of(schema.TEXT).or_missing({}),
    "gin_hash": schema.TEXT.or_missing(""),
    "gin": schema.object_of(schema.TEXT).or_missing({}),
    "config_hash": schema.TEXT.or_missing(""),
    "config": schema.OBJECT.or_none(),
}
"""What `run.json` holds; the configuration comes once the run begins to train."""

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What gin files and bindings say, for the processes of a cluster to compare.

    Attributes:
      digest: a hash of it; empty: unknown.
      settings: the values by the names that they are given to, as text.
    """

    digest: str = ""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)


UNKNOWN = Configuration()


def announce(model_dir: pathlib.Path, configuration: Configuration) -> None:
    """Says which package version and configuration the processes of this run must have; keeps the rest of the file."""
    path = model_dir / RUN_FILE
    record = read(model_dir) if path.is_file() else {}
    versions = {**record.get("versions", {}), "k4p1": k4p1.__version__}
    if record.get("versions") != versions or record.get("gin_hash") != configuration.digest:
        known = {name: value for name, value in record.items() if value not in ("", None)}
        given = {"gin_hash": configuration.digest, "gin": dict(configuration.settings)}
        atomic.write_json(path, {**known, "versions": versions, **given})


def is_announced(model_dir: pathlib.Path) -> bool:
    """Whether a run has begun in a folder, which need not exist yet."""
    return (model_dir / RUN_FILE).is_file()


def compare(model_dir: pathlib.Path, configuration: Configuration) -> None:
    """Checks that this process was started for the run of a folder.

    Args:
      model_dir: with `run.json`.
      configuration: of this process; without digest versions alone are compared.

    Raises:
      ConfigError: another package version or configuration; names the settings that differ.
    """
    record = read(model_dir)
    version = record["versions"].get("k4p1")
    if version != k4p1.__version__:
        raise errors.ConfigError(
            f"the run in {model_dir} is of k4p1 {version}, this process of k4p1 {k4p1.__version__}; install the same version"
        )
    theirs = record["gin_hash"]
    if configuration.digest and theirs and configuration.digest != theirs:
        raise errors.ConfigError(
            f"the run in {model_dir} has another configuration ({_difference(record['gin'], configuration)}); give this "
            "process the --gin_file and --gin_bindings of its coordinator"
        )


def _difference(theirs: Mapping[str, str], configuration: Configuration) -> str:
    ours = configuration.settings
    differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)) if theirs and ours else []
    if not differing:
        return "its files say something else"
    shown = [f"{name} is {theirs.get(name, 'not set')}, here {ours.get(name, 'not set')}" for name in differing[:_SHOWN]]
    more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return "; ".join(shown) + more


def read(model_dir: pathlib.Path) -> dict[str, Any]:
    """The fields of `run.json`.

    Raises:
      ArtifactError: it cannot be read, or a field is wrong.
    """
    return schema.read(model_dir / RUN_FILE, FIELDS)
