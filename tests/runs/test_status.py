"""`k4p1 status`: running, silent, finished and failed runs."""

import json
import multiprocessing
import pathlib
import socket
import time

import pytest

from k4p1.cli import main
from k4p1.files import run_lock, status_file
from k4p1.files.status_file import StatusFile
from k4p1.runs import run_state


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
    with Coordinator(tmp_path) as one:
        written_by(one.process.pid, status, tmp_path, time=time.time() - 120)
        code, out, _ = show(tmp_path, capsys)
    assert code == 11 and f"{tmp_path}: training, last sign of life 2 min 0 s ago (process " in out
    for text in ("5/10", "1.2, at most 3", "0, 1", "lost", "digits: 1 updates did not arrive", "its group continues with 0"):
        assert text in out


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


def _hold(folder, waiting_for, held, let_go):
    with run_lock.run_lock(folder) as lock:
        lock.waits_for(waiting_for)
        held.set()
        let_go.wait(60)


class Coordinator:
    """Another process that holds the lock of a folder, and can be killed."""

    def __init__(self, folder, waiting_for=""):
        context = multiprocessing.get_context("spawn")
        held, self.let_go = context.Event(), context.Event()
        self.process = context.Process(target=_hold, args=(folder, waiting_for, held, self.let_go))
        self.process.start()
        assert held.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join()


def written_by(pid, status, folder, **changes):
    status.update(status_file.TRAINING)
    path = folder / status_file.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": pid, **changes}))


def states(capsys, *folders):
    code = main.main(["status", "--json", *map(str, folders)])
    return code, json.loads(capsys.readouterr().out)["runs"]


class TestStates:
    def test_training_waiting_starting_and_dead_follow_the_lock(self, status, tmp_path, capsys):
        with Coordinator(tmp_path, "worker 0 (host:1)") as one:
            pid = one.process.pid
            code, (run,) = states(capsys, tmp_path)
            assert (code, run["state"], run["reason"]) == (
                12,
                "waiting",
                f"process {pid} on {socket.gethostname()} waits for worker 0 (host:1)",
            )
            assert "waiting: process" in show(tmp_path, capsys)[1]
        with Coordinator(tmp_path) as one:
            code, (run,) = states(capsys, tmp_path)  # the status is still that of the process before
            assert (code, run["state"]) == (10, "starting")
            written_by(one.process.pid, status, tmp_path)
            code, (run,) = states(capsys, tmp_path)
            assert (code, run["state"], run["pid"]) == (11, "training", one.process.pid)
        code, (run,) = states(capsys, tmp_path)  # killed
        assert (code, run["state"]) == (14, "dead") and "is gone; the same command resumes" in run["reason"]
        assert main.main(["status", str(tmp_path)]) == 14

    @pytest.mark.parametrize(("age", "state"), [(60, "training"), (400, "dead")])
    def test_a_free_lock_on_another_machine_is_believed_after_a_silence(self, status, tmp_path, capsys, age, state):
        written_by(1, status, tmp_path, host="elsewhere", time=time.time() - age)
        (tmp_path / run_lock.NAME).write_text("process 1 on elsewhere\n")
        (run,) = states(capsys, tmp_path)[1]
        assert run["state"] == state and run["last_sign_s"] == pytest.approx(age, abs=30)

    def test_to_look_does_not_release_the_lock_of_this_process(self, status, tmp_path):
        with run_lock.run_lock(tmp_path):
            assert run_lock.holder(tmp_path).held
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                assert pool.apply(run_lock.holder, (tmp_path,)).held
        assert run_lock.holder(tmp_path).held is False

    @pytest.mark.parametrize(("end", "expected"), [("finished", 0), ("stopped", 13), ("failed", 15)])
    def test_ends(self, status, tmp_path, capsys, end, expected):
        status.end(end, "why")
        code, (run,) = states(capsys, tmp_path)
        assert (code, run["state"], run["exit_code"], run["reason"]) == (expected, end, expected, "why")

    def test_json_has_the_documented_keys(self, status, tmp_path, capsys):
        status.end("finished")
        (run,) = states(capsys, tmp_path)[1]
        assert run["steps"] == {"done": 5, "target": 10} and run["missing_updates"] == {"digits": 1}
        assert run["tasks"]["digits"]["loss"] == 0.5 and run["workers"]["1"]["state"] == "lost"
        page = (pathlib.Path(__file__).parents[2] / "docs" / "operations.md").read_text()
        for key in run:
            assert f"| `{key}` |" in page, key
        for state, exit_code in run_state.EXIT_CODES.items():
            assert f"| `{state}` | {exit_code} |" in page, state


def test_many_runs_are_one_table(status, tmp_path, capsys):
    status.end("failed", "the loss is nan")
    assert main.main(["status", str(tmp_path), str(tmp_path / "nowhere")]) == 2
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["run", "state", "steps", "last", "sign", "why"]
    assert rows[1].split()[:3] == [str(tmp_path), "failed", "5/10"] and rows[1].rstrip().endswith("the loss is nan")
    assert rows[2].split()[:2] == [f"{tmp_path}/nowhere", "absent"] and len(rows) == 3
