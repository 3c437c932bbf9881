"""What the coordinator says of its run in `run.json` before it waits for its cluster, and servers and workers compare."""

import pathlib
from typing import Any

import k4p1
from k4p1 import errors
from k4p1.files import atomic, schema

RUN_FILE = "run.json"

FIELDS = {
    "versions": schema.object_of(schema.TEXT).or_missing({}),
    "gin_hash": schema.TEXT.or_missing(""),
    "config_hash": schema.TEXT.or_missing(""),
    "config": schema.OBJECT.or_none(),
}
"""What `run.json` holds; the configuration comes once the run begins to train."""


def announce(model_dir: pathlib.Path, gin_hash: str) -> None:
    """Says which package version and configuration the processes of this run must have; keeps the rest of the file."""
    path = model_dir / RUN_FILE
    record = read(model_dir) if path.is_file() else {}
    versions = {**record.get("versions", {}), "k4p1": k4p1.__version__}
    if record.get("versions") != versions or record.get("gin_hash") != gin_hash:
        known = {name: value for name, value in record.items() if value not in ("", None)}
        atomic.write_json(path, {**known, "versions": versions, "gin_hash": gin_hash})


def is_announced(model_dir: pathlib.Path) -> bool:
    """Whether a run has begun in a folder, which need not exist yet."""
    return (model_dir / RUN_FILE).is_file()


def compare(model_dir: pathlib.Path, gin_hash: str) -> None:
    """Checks that this process was started for the run of a folder.

    Args:
      model_dir: with `run.json`.
      gin_hash: of this process; empty compares versions only.

    Raises:
      ConfigError: another package version or configuration.
    """
    record = read(model_dir)
    version = record["versions"].get("k4p1")
    if version != k4p1.__version__:
        raise errors.ConfigError(
            f"the run in {model_dir} is of k4p1 {version}, this process of k4p1 {k4p1.__version__}; install the same version"
        )
    theirs = record["gin_hash"]
    if gin_hash and theirs and gin_hash != theirs:
        raise errors.ConfigError(
            f"the run in {model_dir} has another configuration (hash {theirs[:12]}, here {gin_hash[:12]}); give this "
            "process the --gin_file and --gin_bindings of its coordinator"
        )


def read(model_dir: pathlib.Path) -> dict[str, Any]:
    """The fields of `run.json`.

    Raises:
      ArtifactError: it cannot be read, or a field is wrong.
    """
    return schema.read(model_dir / RUN_FILE, FIELDS)
