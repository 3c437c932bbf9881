"""Runs in one table."""

import json

import pytest

import k4p1
from k4p1 import errors
from k4p1.cli import main
from k4p1.runs.run import RunResult

ENTRY = {
    "patch": "scale_bias+head",
    "steps": 1200,
    "metric": "accuracy",
    "validation_accuracy": 0.5,
    "test_accuracy": 0.25,
    "private_trained": 1234,
    "private_statistics": 56,
    "patch_bytes": 7890,
}


def finished(folder, **tasks):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"tasks": tasks, "shared_parameters": 1}))
    return folder


def test_a_row_for_every_task(tmp_path, capsys):
    one = finished(tmp_path / "one", a=ENTRY, b={**ENTRY, "patch": "head", "test_accuracy": None})
    two = RunResult({"tasks": {"a": {**ENTRY, "steps": 7}}, "shared_parameters": 1}, {}, None)
    found = k4p1.compare(one, two)
    assert [(row["run"], row["task"], row["steps"]) for row in found.rows] == [
        ("one", "a", 1200),
        ("one", "b", 1200),
        ("run 2", "a", 7),
    ]
    lines = [line.replace("│", " ").split() for line in repr(found).splitlines()]
    assert ["one", "a", "scale_bias+head", "1,200", "0.500", "0.250", "1,234", "56", "7,890"] in lines
    assert ["one", "b", "head", "1,200", "0.500", "-", "1,234", "56", "7,890"] in lines
    assert found._repr_html_().count("<tr>") == 4
    assert main.main(["compare", str(one)]) == 0
    assert "scale_bias+head" in capsys.readouterr().out


def test_names(tmp_path):
    first, second = (finished(tmp_path / part / "run", a=ENTRY) for part in ("x", "y"))
    assert [row["run"] for row in k4p1.compare([first, second]).rows] == [str(first), str(second)]
    assert [row["run"] for row in k4p1.compare({"small": first, "large": second}).rows] == ["small", "large"]
    assert [row["run"] for row in k4p1.compare(first, second).rows] == [str(first), str(second)]
    with pytest.raises(errors.ConfigError, match="or runs one after another"):
        k4p1.compare({"small": first}, second)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds no finished run; see k4p1 status"),
        ({"tasks": {"a": {}}}, "task a has no field 'steps'"),
        ({"tasks": {"a": {**ENTRY, "patch_bytes": "many"}}}, "field 'patch_bytes' is 'many'"),
    ],
)
def test_what_is_no_result(tmp_path, content, says, capsys):
    if content is not None:
        (tmp_path / "result.json").write_text(json.dumps(content))
    assert main.main(["compare", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1


def test_a_dry_run_and_other_things_are_refused():
    with pytest.raises(errors.ConfigError, match="a dry run has no results"):
        k4p1.compare(RunResult({}, {}, None))
    with pytest.raises(errors.ConfigError, match="a run is a int"):
        k4p1.compare([3])
