"""What a user can get wrong with clusters: one line, an exit code, nothing left running."""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

import pytest

from k4p1 import errors
from k4p1.cli import main
from k4p1.cluster import server
from k4p1.cluster.connection import check_port, silence_of, wait_for
from k4p1.cluster.spec import ClusterSpec, on_this_machine
from k4p1.files import run_record

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = {"chief": ["127.0.0.1:1"], "ps": ["127.0.0.1:2"], "worker": ["127.0.0.1:3"]}


def run(*arguments, tf_config=None):
    """The command line in a process of its own: (exit code, lines on stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    environment.pop("TF_CONFIG", None)
    if tf_config is not None:
        environment["TF_CONFIG"] = tf_config if isinstance(tf_config, str) else json.dumps(tf_config)
    command = [sys.executable, "-m", "k4p1", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr.strip().splitlines()


def role(job, index=0):
    return {"cluster": SPEC, "task": {"type": job, "index": index}}


@pytest.mark.parametrize(
    ("arguments", "tf_config", "message"),
    [
        (["train", "--local_cluster", "ps:1"], "", "does not say how many worker; expected ps:1,workers:2"),
        (["train", "--local_cluster", "ps:0,workers:1"], "", "expected counts of 1 or more"),
        (["train", "--local_cluster", "ps:1,workers:1", "--gin_file", "quikstart"], "", "did you mean 'quickstart'"),
        (["train", "--local_cluster", "ps:1,workers:1"], json.dumps(role("chief")), "TF_CONFIG is set"),
        (["train", "--local_cluster", "ps:1,workers:1", "--slurm", "ps:1"], "", "exclude each other"),
        (["train", "--slurm", "ps:1"], "", "start it with srun"),
        (["train", "--slurm", "workers:1"], "", "--slurm='workers:1'"),
        (["join"], "", "TF_CONFIG is not set"),
        (["join"], "{", "TF_CONFIG is no JSON"),
        (["join"], json.dumps(role("chief")), "makes this process the coordinator; start it with 'k4p1 train'"),
        (["train"], json.dumps(role("worker")), "makes this process worker 0; start it with 'k4p1 join'"),
    ],
)
def test_usage(arguments, tf_config, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TF_CONFIG", tf_config)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert main.main([*arguments, "--model_dir", str(tmp_path / "m")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("k4p1: ")
    assert re.search(message, said), said
    assert not (tmp_path / "m").exists()


def test_a_worker_of_another_run(tmp_path):
    run_record.announce(tmp_path, run_record.Configuration("0" * 64))
    code, said = run("join", "--model_dir", tmp_path, "--gin_file", "quickstart", tf_config=role("worker"))
    assert code == 1 and len(said) == 1 and "another configuration (its files say something else)" in said[0]


def test_a_worker_whose_port_is_in_use(tmp_path):
    run_record.announce(tmp_path, run_record.Configuration(""))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = {"cluster": {**SPEC, "worker": [address]}, "task": {"type": "worker", "index": 0}}
        code, said = run("join", "--model_dir", tmp_path, tf_config=config)
    assert code == 1 and f"of {address} cannot be used (Address already in use)" in said[-1]


def test_a_port_that_is_free_again():
    """A port that a killed process has left may be used at once."""
    spec = on_this_machine(1, 1)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", int(spec.address.split(":")[1])))
        listening.listen()
        connection = socket.create_connection(spec.address.split(":"))
        with connection, pytest.raises(errors.ConfigError, match="coordinator: port"):
            check_port(spec)
    check_port(spec)


def test_an_address_where_nobody_answers():
    spec = on_this_machine(1, 2)
    with pytest.raises(errors.ClusterError) as caught:
        wait_for(spec, startup_timeout_s=0.5)
    message = str(caught.value)
    assert (caught.value.exit_code == 75 and "after 1 s" in message) or "after 0 s" in message
    assert all(address in message for address in [*spec.jobs["ps"], *spec.jobs["worker"]])
    assert isinstance(spec, ClusterSpec)


@contextlib.contextmanager
def listening(answer=None):
    """An address that accepts connections, and answers with some bytes or not at all."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.sendall(answer)

        held = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, ": accepts connections, and is silent"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ": another service answers there"),
        (b"SSH-2", ": another service answers there"),
        (SETTINGS, ""),
    ],
)
def test_who_is_at_an_address(answer, said, monkeypatch):
    monkeypatch.setattr("k4p1.cluster.connection._PROBE_SECONDS", 0.3)
    with listening(answer) as address:
        assert silence_of(address) == said
    assert silence_of(on_this_machine(1, 1).address) == ": nobody listens"


def test_connecting_ends_in_time_and_names_who_is_silent(monkeypatch):
    monkeypatch.setattr("k4p1.cluster.connection._PROBE_SECONDS", 0.3)
    with listening(SETTINGS) as server, listening() as silent, listening(b"HTTP/1.1 400\r\n") as other:
        spec = ClusterSpec({"chief": ("127.0.0.1:1",), "ps": (server,), "worker": (silent, other)}, "chief", 0)
        with pytest.raises(errors.ClusterError) as caught:
            wait_for(spec, startup_timeout_s=0.5)
    assert f"worker 0 ({silent}: accepts connections, and is silent)" in str(caught.value)
    assert f"worker 1 ({other}: another service answers there)" in str(caught.value) and server not in str(caught.value)


def test_a_restarted_coordinator_goes_on_without_a_silent_worker(monkeypatch):
    monkeypatch.setattr("k4p1.cluster.connection._PROBE_SECONDS", 0.3)
    with listening(SETTINGS) as server, listening() as silent, listening(SETTINGS) as well:
        spec = ClusterSpec({"chief": ("127.0.0.1:1",), "ps": (server,), "worker": (silent, well)}, "chief", 0)
        told = []
        assert wait_for(spec, 60.0, spare_s=0.1, tell=told.append) == [1]
        assert told == [f"continuing without worker 0 ({silent}: accepts connections, and is silent)"]
        spec = ClusterSpec({"chief": ("127.0.0.1:1",), "ps": (silent,), "worker": (well,)}, "chief", 0)
        with pytest.raises(errors.ClusterError, match="parameter server 0"):  # nobody goes on without a server
            wait_for(spec, 0.5, spare_s=0.1)


def test_waiting_says_for_whom(capsys, monkeypatch):
    spec = on_this_machine(1, 1)
    monkeypatch.setattr("k4p1.cluster.connection._SILENT_SECONDS", 0.0)
    with pytest.raises(errors.ClusterError):
        wait_for(spec, startup_timeout_s=0.8)
    said = capsys.readouterr().err.splitlines()
    server, worker = (f"({spec.jobs[job][0]}: nobody listens)" for job in ("ps", "worker"))
    assert said == [f"waiting for parameter server 0 {server}, worker 0 {worker}"]


def test_fewer_workers_than_tasks(cluster_run):
    """Seen end to end: the coordinator refuses, and everything that was started is stopped."""
    run_ = cluster_run("ps:1,workers:1", "steps = 2").start()
    code, said = run_.finish()
    assert code == 1 and said.strip().splitlines()[-1].startswith("k4p1: 2 tasks need at least 2 workers, the cluster has 1")
    assert run_.left_behind() == []


def test_a_second_launcher_refuses_before_it_announces_anything(tmp_path, capsys):
    """Servers and workers of the run that is there would leave if they met another configuration."""
    run_record.announce(tmp_path, run_record.Configuration("0" * 64))
    before = (tmp_path / "run.json").read_bytes()
    program = f"""
import pathlib, sys
from k4p1.files import run_lock
with run_lock.run_lock(pathlib.Path({str(tmp_path)!r}), run_lock.LAUNCHER):
    print("held", flush=True)
    sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        arguments = ["train", "--gin_file", "quickstart", "--model_dir", str(tmp_path)]
        assert main.main([*arguments, "--local_cluster", "ps:1,workers:2"]) == 1
        holder.stdin.close()
    assert f"{tmp_path} is in use by a coordinator (process {holder.pid} on " in capsys.readouterr().err
    assert (tmp_path / "run.json").read_bytes() == before and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("status", "stopped", "over"),
    [
        ({}, False, False),
        ({"state": "finished", "time": 5.0}, False, False),  # of the run before
        ({"state": "finished", "time": 4.0}, False, True),  # another one, though clocks may say otherwise
        ({"state": "training", "time": 9.0}, False, False),
        ({"state": "failed", "time": 9.0}, False, True),
        ({"state": "stopped", "time": 9.0}, False, False),
        ({"state": "stopped", "time": 9.0}, True, True),
    ],
)
def test_when_a_server_leaves(status, stopped, over):
    assert server._is_over(status, {"state": "finished", "time": 5.0}, stopped) is over


def test_a_task_without_workers(capsys, tmp_path):
    arguments = ["train", "--gin_file", "quickstart", "--model_dir", str(tmp_path / "m")]
    assert main.main([*arguments, "--gin_bindings", "digits/Task.workers = 0"]) == 1
    assert "task 'digits': workers=0; expected a positive whole number" in capsys.readouterr().err
