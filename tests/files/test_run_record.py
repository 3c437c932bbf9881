"""The run of a folder: its lock, and what servers and workers compare with it."""

import json
import multiprocessing
import os
import threading
import time

import pytest

import k4p1
from k4p1 import errors
from k4p1.cli import gin_files
from k4p1.cluster import local, server
from k4p1.files import run_record
from k4p1.files.run_lock import holder, run_lock

ABC = run_record.Configuration("abc")


def test_workers_of_the_run_may_work(tmp_path, capsys):
    run_record.announce(tmp_path, ABC)
    server.wait_for_run(tmp_path, ABC, "worker 0", "host:1")
    server.wait_for_run(tmp_path, run_record.UNKNOWN, "worker 0", "host:1")  # without a gin file: the version is compared
    assert capsys.readouterr().out == ""


def test_another_configuration_is_refused(tmp_path):
    run_record.announce(tmp_path, ABC)
    with pytest.raises(errors.ConfigError, match=r"another configuration \(its files say something else\)"):
        run_record.compare(tmp_path, run_record.Configuration("abd"))


def test_the_settings_that_differ_are_named(tmp_path):
    theirs = gin_files.configuration(["quickstart"], ["steps = 100", "batch_size = 8"])
    ours = gin_files.configuration(["quickstart"], ["steps = 200", "batch_size=8", "seed = 1"])
    run_record.announce(tmp_path, theirs)
    with pytest.raises(errors.ConfigError) as caught:
        run_record.compare(tmp_path, ours)
    assert "another configuration (seed is 0, here 1; steps is 100, here 200); give this process" in str(caught.value)
    run_record.compare(tmp_path, theirs)


def test_settings_over_several_lines_and_comments_are_read(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text("# first\na/Task.patch = 'head'  # why\ntrain.tasks = [\n  @a/Task(),\n  @b/Task(),\n]\nsteps = 3\n")
    found = gin_files.configuration([str(path)], ["steps = 4"])
    assert found.settings == {"a/Task.patch": "'head'", "train.tasks": "[ @a/Task(), @b/Task(), ]", "steps": "4"}


def test_another_version_is_refused(tmp_path, monkeypatch):
    run_record.announce(tmp_path, ABC)
    monkeypatch.setattr(k4p1, "__version__", "99.0")
    with pytest.raises(errors.ConfigError, match=r"is of k4p1 .*, this process of k4p1 99.0"):
        run_record.compare(tmp_path, ABC)


def test_a_worker_may_come_before_the_folder(tmp_path, capsys):
    folder = tmp_path / "later"
    waiting = threading.Thread(target=server.wait_for_run, args=(folder, ABC, "worker 0", "host:1"), daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive() and not folder.exists()
    folder.mkdir()
    run_record.announce(folder, ABC)
    waiting.join(10)
    assert not waiting.is_alive()
    assert "to begin its run in" in (said := capsys.readouterr().out) and "which does not exist here yet" in said


def test_a_worker_that_comes_first_waits_and_says_for_whom(tmp_path, capsys):
    waiting = threading.Thread(target=server.wait_for_run, args=(tmp_path, ABC, "worker 0", "host:1"), daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    run_record.announce(tmp_path, ABC)
    waiting.join(10)
    assert not waiting.is_alive()
    assert capsys.readouterr().out == f"worker 0: waiting for the coordinator (host:1) to begin its run in {tmp_path}\n"


def test_announcing_keeps_what_the_run_wrote(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config_hash": "x", "config": {"a": 1}, "versions": {"keras": "3"}}))
    run_record.announce(tmp_path, ABC)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"] == {"a": 1} and record["versions"] == {"keras": "3", "k4p1": k4p1.__version__}


def _hold(folder, held, let_go):
    with run_lock(folder):
        held.set()
        let_go.wait(60)


def test_two_coordinators(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(tmp_path / "m", held, let_go))
    first.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(errors.ConfigError, match=rf"in use by a coordinator \(process {first.pid} on "),
            run_lock(tmp_path / "m"),
        ):
            pass
        with pytest.raises(errors.ConfigError, match="in use by a coordinator"):
            local.launch("train", [], tmp_path / "m", 1, 1)  # refused before anything is started
        assert not (tmp_path / "m" / "logs").exists()
    finally:
        first.kill()  # however it ends, the lock is free again
        first.join()
    with run_lock(tmp_path / "m"):
        pass


def test_a_full_disk_costs_a_line_of_the_lock_and_not_the_run(tmp_path, full_disk):
    with run_lock(tmp_path) as lock:
        with full_disk():
            lock.waits_for("worker 1")
        assert lock.text().startswith(f"process {os.getpid()} on ") and holder(tmp_path).waiting_for == ""
        lock.waits_for("worker 2 of a long name")
        lock.waits_for("worker 2")
        assert holder(tmp_path).waiting_for == "worker 2"
