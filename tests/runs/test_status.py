"""`k4p1 status`: running, silent, finished and failed runs."""

import json
import time

import pytest

from k4p1.cli import main
from k4p1.files import status_file
from k4p1.files.status_file import StatusFile


def show(folder, capsys):
    code = main.main(["status", str(folder)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def status(tmp_path):
    made = StatusFile()
    made.begin(tmp_path)
    tasks = {
        "digits": {"done": 5, "target": 10, "loss": 0.5, "staleness_mean": 1.25, "staleness_max": 3.0, "workers": [0, 1]}
    }
    workers = {
        0: {"state": "working", "tasks": ["digits"], "steps": 3},
        1: {"state": "lost", "tasks": ["digits"], "steps": 2},
    }
    made.update(status_file.TRAINING, tasks=tasks, workers=workers, owners={"digits": {"missing": 1}})
    made.event("worker 1 of digits is lost; its group continues with 0")
    return made


def test_a_running_run(status, tmp_path, capsys):
    code, out, _ = show(tmp_path, capsys)
    assert code == 0 and f"{tmp_path}: training (process " in out
    for text in ("5/10", "1.2, at most 3", "0, 1", "lost", "digits: 1 updates did not arrive", "its group continues with 0"):
        assert text in out


def test_a_run_that_died(status, tmp_path, capsys):
    path = tmp_path / status_file.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "time": time.time() - 120}))
    assert "but no sign of life for 2 min 0 s; the same command resumes" in show(tmp_path, capsys)[1]


def test_a_finished_run_shows_what_it_reached(status, tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps({"tasks": {"digits": {"test_accuracy": 0.875}}}))
    status.end(status_file.FINISHED)
    out = show(tmp_path, capsys)[1]
    assert ": finished 0 s ago" in out and "0.875" in out


def test_a_failed_run_says_why(status, tmp_path, capsys):
    status.end(status_file.FAILED, "the loss is nan\n  and more")
    assert ": failed 0 s ago: the loss is nan (" in show(tmp_path, capsys)[1]


def test_no_run(tmp_path, capsys):
    assert show(tmp_path / "nowhere", capsys)[0] == 2
    code, _, said = show(tmp_path, capsys)
    assert code == 2 and "no run of k4p1 has begun to train there" in said


def test_only_the_last_events_are_kept(tmp_path):
    made = StatusFile()
    made.begin(tmp_path)
    for number in range(30):
        made.event(str(number))
    assert [event["text"] for event in status_file.read(tmp_path)["events"]] == [str(n) for n in range(10, 30)]
