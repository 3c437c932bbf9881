"""docs/gin.md says all that a gin file can set, and is up to date."""

import dataclasses
import inspect
import pathlib

import pytest

from k4p1.cli import gin_config, gin_names, main
from k4p1.runs.settings import RunSettings

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "gin.md"


def test_the_committed_page_is_what_the_command_prints(capsys):
    assert main.main(["configs", "--reference"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Runs\n")
    written = PAGE.read_text(encoding="utf-8")
    found = written[written.index("\n## Runs\n") + 1 :]
    assert found == printed, "docs/gin.md is out of date: replace it from '## Runs' on by 'k4p1 configs --reference'"


@pytest.mark.parametrize("name", gin_config.CONFIGURABLES)
def test_every_parameter_has_a_meaning(name):
    """A row per parameter, none of whose last cells is empty."""
    written = PAGE.read_text(encoding="utf-8")
    part = written.split(f"\n### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    known = set(inspect.signature(gin_config._CONFIGURABLES[name]).parameters)
    if name in ("train", "finetune"):  # settings of every run have a table of their own
        known -= {field.name for field in dataclasses.fields(RunSettings)}
    assert {row.split("`")[1].strip("*") for row in rows} == known
    assert not [row for row in rows if row.endswith("|  |")]


def test_settings_of_a_run_are_listed():
    written = PAGE.read_text(encoding="utf-8")
    for name in gin_names.parameters("train", gin_config._CONFIGURABLES["train"]):
        if name not in ("settings", *gin_config.gin_reference.OF_THE_COMMAND_LINE):
            assert f"\n| `{name}` | " in written, name
