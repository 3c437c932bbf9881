"""The examples of docs/python.md, one after another."""

import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "python.md"


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    for number, block in enumerate(blocks):
        exec(compile(block, f"python.md, example {number}", "exec"), names)
    assert (tmp_path / "runs" / "colours" / "tasks" / "colours" / "confusion_test.png").is_file()
    assert len(names["patches"]) == 3
    assert "goes on, third from 10 to 30 steps" in capsys.readouterr().out
