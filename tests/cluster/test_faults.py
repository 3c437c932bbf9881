"""Workers, servers and coordinators of real clusters are killed; every task still ends at its exact step target."""

import os
import signal

import pytest

from k4p1.files import tensor_file

pytestmark = [pytest.mark.processes, pytest.mark.timeout(480)]

STEPS = 400
DISPATCH = 16


def check_counts(run, groups, resumed=False, steps=STEPS):
    """Counters at their targets, steps by the right workers, at most one update missing per interrupted dispatch."""
    result = run.read("result.json")["cluster"]
    tasks = run.read("status.json")["tasks"]
    assert {task: values["done"] for task, values in tasks.items()} == dict.fromkeys(groups, steps)
    interrupted = result["interrupted_steps"]
    for task, workers in groups.items():
        counts = result["steps_by_worker"][task]
        assert set(counts) <= set(workers), task
        if not resumed:
            assert steps - DISPATCH * interrupted.get(task, 0) <= sum(counts.values()) <= steps
            assert 0 <= result["missing_updates"][task] <= interrupted.get(task, 0)
    if not resumed:
        assert 0 <= result["missing_updates"]["shared"] <= sum(interrupted.values())
    for owner, missing in result["missing_updates"].items():
        users = groups if owner == "shared" else [owner]
        dropped = sum(result["late_updates"][task] + result["overflowed_updates"][task] for task in users)
        assert result["updates"][owner] + missing + dropped == steps * len(users)
    newest = sorted(run.folder.glob("checkpoints/step_*"))[-1]
    assert newest.name == f"step_{steps * len(groups):08d}.safetensors"
    return result


def test_workers_are_killed(cluster_run):
    """One in the middle of a step, the same one again, then all of a group."""
    run = cluster_run("ps:2,workers:3", "steps = 900", "digits/Task.workers = 2").start()
    run.wait_for_steps(20)
    for times in (1, 2):
        run.kill("worker_1")
        run.wait_for(lambda times=times: run.events().count("worker 1 is back") == times, "return of worker 1")
    run.kill("worker_0")
    run.kill("worker_1")
    code, said = run.finish()
    assert code == 0, said
    result = check_counts(run, {"digits": ["0", "1"], "parity": ["2"]}, steps=900)
    assert 1 <= result["interrupted_steps"]["digits"] <= 4
    assert said.count("worker 1 ended (SIGKILL); starting it again") == 3
    assert "worker 1 of digits is lost; its group continues with 0" in said
    assert "worker 1 is back" in said
    assert run.left_behind() == []


def test_a_server_is_killed(cluster_run):
    """The coordinator saves nothing broken, waits, returns to the newest checkpoint and says how much that costs."""
    run = cluster_run("ps:2,workers:2", f"steps = {STEPS}", "train.checkpoint_every = 120").start()
    run.wait_for(lambda: list(run.folder.glob("checkpoints/step_*")), "checkpoint")
    run.wait_for_steps(int(sorted(run.folder.glob("checkpoints/step_*"))[-1].stem[5:]) + 20)
    coordinator = run.read("status.json")["pid"]
    run.kill("ps_1")
    code, said = run.finish()
    assert code == 0, said
    assert "a parameter server is lost" in said and "returning to the newest checkpoint" in said
    assert "steps since that checkpoint are lost and taken again: digits " in said
    assert run.read("status.json")["pid"] == coordinator  # the same process, begun anew
    check_counts(run, {"digits": ["0"], "parity": ["1"]}, resumed=True)
    assert run.left_behind() == []


def test_the_coordinator_is_killed_during_a_checkpoint(cluster_run):
    """What was half written does not count; the same command goes on. Then SIGTERM, and once more."""
    run = cluster_run("ps:1,workers:2", f"steps = {STEPS}", "train.checkpoint_every = 20").start()
    run.wait_for(lambda: list(run.folder.glob("checkpoints/step_*")), "first checkpoint")
    # A small one is written within milliseconds.
    run.wait_for(lambda: list(run.folder.glob("checkpoints/.step_*.partial")), "another one being written", pause=0.0005)
    os.kill(run.read("status.json")["pid"], signal.SIGKILL)
    code, said = run.finish()
    assert code == 75 and "the coordinator is lost (SIGKILL)" in said.strip().splitlines()[-1], said
    assert run.left_behind() == []
    for path in run.folder.glob("checkpoints/step_*"):
        tensor_file.read(path, "k4p1-checkpoint", 1)  # whole, by its content hash

    before = run.steps()
    run.start()
    run.wait_for_steps(before + 30)
    run.process.send_signal(signal.SIGTERM)
    code, said = run.finish()
    assert code == 75 and "asked to stop (SIGTERM); saved at step" in said.strip().splitlines()[-1], said
    assert "resuming from the checkpoint" in said
    assert run.left_behind() == []

    code, said = run.start().finish()
    assert code == 0, said
    check_counts(run, {"digits": ["0"], "parity": ["1"]}, resumed=True)
    assert run.left_behind() == []


def test_a_worker_falls_silent(cluster_run):
    """It is stopped, not killed: no connection breaks. An alarm names its task; when it goes on, so does the task."""
    often = ("train.evaluate_every = 100", "train.checkpoint_every = 100")  # neither waits for the silent one
    run = cluster_run("ps:1,workers:2", f"steps = {STEPS}", *often).start()
    run.wait_for_steps_of(1, 20)
    pid = run.pid("worker_1")
    os.kill(pid, signal.SIGSTOP)
    try:
        run.wait_for(lambda: any("ALARM: task 'parity'" in event for event in run.events()), "alarm")
    finally:
        os.kill(pid, signal.SIGCONT)
    code, said = run.finish()
    assert code == 0, said
    assert "worker 1 is back" in said
    check_counts(run, {"digits": ["0"], "parity": ["1"]})
    assert run.left_behind() == []


def test_a_server_falls_silent(cluster_run):
    """The coordinator is replaced by one that waits for it, by name; then SIGTERM ends a run of which everything hangs."""
    run = cluster_run(
        "ps:1,workers:2", f"steps = {STEPS}", "train.checkpoint_every = 60", "train.silence_timeout_s = 4"
    ).start()
    run.wait_for(lambda: list(run.folder.glob("checkpoints/step_*")), "checkpoint")
    server = run.pid("ps_0")
    os.kill(server, signal.SIGSTOP)
    try:
        run.wait_for(lambda: any("returning to the newest checkpoint" in event for event in run.events()), "restart")
        run.wait_for(lambda: any("waiting for parameter server 0" in event for event in run.events()), "its name")
    finally:
        os.kill(server, signal.SIGCONT)
    before = run.steps()
    run.wait_for_steps(before + 20)
    stopped = [server, run.pid("worker_0"), run.pid("worker_1")]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    run.process.send_signal(signal.SIGTERM)
    code, said = run.finish()
    assert code == 75, said
    assert run.left_behind() == []
