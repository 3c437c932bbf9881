"""Processes on this machine: started again when they die, given up when they cannot run, stopped with the cluster."""

import pathlib
import subprocess
import sys
import time

import pytest

from k4p1.cluster import fork_server, local
from k4p1.cluster.local import LocalCluster

pytestmark = pytest.mark.processes


@pytest.fixture
def stand_in(monkeypatch):
    """Members run a Python program of the test in place of a TensorFlow server."""

    def replace(program):
        real = subprocess.Popen

        def popen(command, **how):
            return real([sys.executable, "-c", program], **how)

        monkeypatch.setattr(fork_server.subprocess, "Popen", popen)
        monkeypatch.setattr(local, "_LONGEST_PAUSE_SECONDS", 0.05)
        monkeypatch.setattr(local, "_LOOK_SECONDS", 0.02)

    return replace


SERVES = "import os, time; print(f'serving (process {os.getpid()})', flush=True); time.sleep(60)"


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def served(cluster, job, index):
    log = cluster.log(cluster.spec.of(job, index))
    return log.read_text().count("serving") if log.exists() else 0


def test_a_killed_member_is_started_again_as_often_as_it_served(stand_in, tmp_path, capfd):
    stand_in(SERVES)
    with LocalCluster(1, 1, tmp_path, restarts=1) as cluster:
        for times in range(1, 5):
            wait_until(lambda times=times: served(cluster, "worker", 0) == times)
            cluster.kill("worker", 0)
        wait_until(lambda: served(cluster, "worker", 0) == 5)
        process, pid = cluster.process("ps", 0), cluster.process("ps", 0).pid
        assert cluster.failure is None and served(cluster, "ps", 0) == 1
    assert process.returncode is not None and not pathlib.Path(f"/proc/{pid}").exists()
    assert capfd.readouterr().err.count("worker 0 ended (SIGKILL); starting it again") == 4


def test_a_member_that_never_serves_is_given_up(stand_in, tmp_path):
    stand_in("import os, signal; print('no memory', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    with LocalCluster(1, 1, tmp_path, restarts=2) as cluster:
        wait_until(lambda: cluster.failure is not None)
    assert "died 3 times before it served; " in cluster.failure and "no memory (" in cluster.failure


def test_a_member_that_refuses_is_not_started_again(stand_in, tmp_path):
    stand_in("import sys; sys.exit('k4p1: worker 0: the port is in use')")
    with LocalCluster(1, 1, tmp_path) as cluster:
        wait_until(lambda: cluster.failure is not None)
    assert "the port is in use" in cluster.failure and "\n" not in cluster.failure


def test_a_member_that_has_done_its_work_is_left_alone(stand_in, tmp_path):
    stand_in("print('over')")
    with LocalCluster(1, 1, tmp_path) as cluster:
        wait_until(lambda: cluster.process("worker", 0).poll() == 0)
        time.sleep(0.2)
        assert cluster.failure is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", ["-1", "-1", "-1", "-1"]),
        ("0,1", ["-1", "-1", "0", "1"]),
        ("3", ["-1", "-1", "3", "3"]),
        ("0,1,2", ["2", "-1", "0", "1"]),
    ],
)
def test_one_gpu_a_worker(monkeypatch, visible, expected):
    """In the order coordinator, server, two workers."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    spec = local.on_this_machine(1, 2)
    roles = [spec, spec.of("ps", 0), spec.of("worker", 0), spec.of("worker", 1)]
    assert [local._gpu(role)["CUDA_VISIBLE_DEVICES"] for role in roles] == expected
