"""Processes forked from one that has imported TensorFlow."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from k4p1.cluster import fork_server
from k4p1.cluster.fork_server import ForkServer

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")]

PROGRAM = """
import os, sys, time
own_session = os.getsid(0) == os.getpid()
print(sys.argv[1:], os.environ.get("COLOUR"), "tensorflow" in sys.modules, own_session, flush=True)
print(f"{os.getpid()} of {os.environ['K4P1_PARENT']} {os.getppid()}", file=sys.stderr, flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A package that stands for `k4p1` where a fork begins to run, so that any program can."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "stand_in.py").write_text(
        f"import runpy\nprogram = {PROGRAM!r}\n"
        "def run_module(name, run_name):\n"
        "    assert (name, run_name) == ('k4p1', '__main__')\n"
        "    exec(compile(program, 'program', 'exec'), {})\n"
        "runpy.run_module = run_module\n"
    )
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    yield
    os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def forks(program, tmp_path_factory):
    server = ForkServer(["stand_in"], tmp_path_factory.mktemp("run"))
    yield server
    server.close()


def start(forks, log, seconds=0.0, code=0):
    environment = {**os.environ, "COLOUR": "blue"}
    return forks.start([str(seconds), str(code)], environment, log, "worker 7")


def test_a_fork_has_its_arguments_environment_log_and_session(forks, tmp_path):
    assert "COLOUR" not in os.environ
    process = start(forks, tmp_path / "log", code=3)
    assert process.wait(60) == 3 == process.returncode == process.poll()
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first == "['0.0', '3'] blue True True"
    pid, _, parent, real_parent = second.split()
    assert int(pid) == process.pid and parent == real_parent != str(os.getpid())


def test_signals_and_waiting(forks, tmp_path):
    one, two = (start(forks, tmp_path / f"log{i}", seconds=60) for i in range(2))
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.1)
    assert pathlib.Path(f"/proc/{one.pid}/comm").read_text() == "k4p1 worker 7\n"
    one.kill()
    assert one.wait(30) == -signal.SIGKILL and two.poll() is None
    two.send_signal(signal.SIGTERM)
    assert two.wait(30) == -signal.SIGTERM
    two.kill()  # as of a process that is gone


def test_a_server_that_is_lost_is_replaced_and_its_forks_end_by_themselves(forks, tmp_path):
    before = start(forks, tmp_path / "before", seconds=60)
    forks._process.kill()
    forks._process.wait()
    assert before.poll() is None  # it may have something to save
    after = start(forks, tmp_path / "after")
    assert after.wait(60) == 0 and before.poll() is None
    before.kill()
    assert before.wait(30) == -signal.SIGKILL


def test_a_server_that_is_silent_is_given_up(forks, tmp_path, monkeypatch):
    assert start(forks, tmp_path / "before").wait(60) == 0
    monkeypatch.setattr(fork_server, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(fork_server, "_COMMAND", [sys.executable, "-c", PROGRAM])
    frozen = forks._process
    os.kill(frozen.pid, signal.SIGSTOP)
    process = start(forks, tmp_path / "log", code=5)
    assert process.wait(60) == 5 and isinstance(process, subprocess.Popen)
    assert frozen.wait(30) == -signal.SIGKILL


def test_a_silent_server_hides_no_end(forks, tmp_path):
    process = start(forks, tmp_path / "log", seconds=60)
    os.kill(forks._process.pid, signal.SIGSTOP)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert start(forks, tmp_path / "next").wait(60) == 0


def test_where_threads_forbid_a_fork_processes_start_anew(program, tmp_path, monkeypatch):
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"])))
    monkeypatch.setattr(fork_server, "_COMMAND", [sys.executable, "-c", PROGRAM])
    server = ForkServer(["threads"], tmp_path)
    try:
        process = start(server, tmp_path / "log", code=4)
        assert isinstance(process, subprocess.Popen) and process.wait(60) == 4
        assert (tmp_path / "log").read_text().startswith("['0.0', '4'] blue False True")
    finally:
        server.close()


def test_the_server_ends_with_who_started_it(program, tmp_path):
    starter = (
        "import os, pathlib, time\nfrom k4p1.cluster.fork_server import ForkServer\n"
        f"server = ForkServer(['stand_in'], pathlib.Path({str(tmp_path)!r}))\n"
        f"server.start(['0', '0'], dict(os.environ), pathlib.Path({str(tmp_path / 'log')!r})).wait(60)\n"
        "print(server._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    end = time.monotonic() + 30
    while pathlib.Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
