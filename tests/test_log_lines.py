"""Log lines: the time in front of text, or one JSON object per line."""

import contextlib
import errno
import io
import json
import re
import sys

import pytest

from k4p1 import log_lines
from k4p1.cli import main

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def test_text_has_the_time_in_front(capsys):
    with log_lines.logging(as_json=False):
        print("one\ntwo", file=sys.stderr)
        print("a result")
    printed = capsys.readouterr()
    assert re.fullmatch(f"{MOMENT} one\n{MOMENT} two\n", printed.err) and printed.out == "a result\n"


def test_objects(capsys):
    with log_lines.logging(as_json=True):
        print("k4p1: warning: unused binding 'a'", file=sys.stderr)
        print("ALARM: task 'a' has no live worker", file=sys.stderr)
        log_lines.record("a 1/2", event="progress", tasks={"a": {"done": 1}})
        print("a result", end="")
    printed = capsys.readouterr()
    warning, alarm, progress = map(json.loads, printed.err.splitlines())
    assert (warning["level"], warning["text"]) == ("warning", "unused binding 'a'")
    assert (alarm["level"], alarm["text"]) == ("alarm", "ALARM: task 'a' has no live worker")
    assert progress["tasks"] == {"a": {"done": 1}} and re.fullmatch(MOMENT, progress["time"])
    assert json.loads(printed.out)["text"] == "a result"
    print("plain again", file=sys.stderr)
    assert capsys.readouterr().err == "plain again\n"


def test_terminals_show_lines_as_they_are(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with log_lines.logging(as_json=False):
        print("one", file=sys.stderr)
    assert terminal.getvalue() == "one\n"


def test_text_of_both_forms():
    assert log_lines.text_of('{"level": "error", "text": "no"}') == "no"
    assert log_lines.text_of("{no object") == "{no object" and log_lines.text_of('{"a": 1}') == '{"a": 1}'


def test_an_error_is_an_object_like_the_other_lines(capsys):
    assert main.main(["train", "--log_json", "--gin_file", "quickstat", "--model_dir", "m"]) == 1
    error = json.loads(capsys.readouterr().err)
    assert error["level"] == "error" and error["text"].startswith("unknown gin file 'quickstat'; did you mean 'quickstart'")


@pytest.mark.parametrize(("number", "is_kept_quiet"), [(errno.ENOSPC, True), (errno.EFBIG, True), (errno.EBADF, False)])
def test_a_full_disk_costs_lines_and_not_the_run(number, is_kept_quiet):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(number, "no room")

    stream = log_lines.LogStream(Full(), as_json=False)
    with contextlib.nullcontext() if is_kept_quiet else pytest.raises(OSError, match="no room"):
        stream.write("a line\n")


def test_a_line_for_which_there_was_no_room_comes_with_the_next_one(tmp_path, full_disk):
    with open(tmp_path / "log", "w") as file:
        stream = log_lines.LogStream(file, as_json=True)
        with full_disk():
            stream.write("first\n")
        stream.write("second\n")
    assert [json.loads(line)["text"] for line in (tmp_path / "log").read_text().splitlines()] == ["first", "second"]
