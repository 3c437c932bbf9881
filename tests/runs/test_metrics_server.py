"""Metrics for Prometheus: what the status says, as text over HTTP."""

import re
import socket
import urllib.error
import urllib.request

import pytest

from k4p1 import errors
from k4p1.files import status_file
from k4p1.files.status_file import StatusFile
from k4p1.runs.metrics_server import metrics_server, render


@pytest.fixture
def status():
    made = StatusFile()
    tasks = {"digits": {"done": 5, "target": 10, "loss": 0.5, "examples_per_s": 64.0, "validation_accuracy": 0.75}}
    workers = {0: {"state": "working"}, 1: {"state": "lost"}, 2: {"state": "working"}}
    made.update(status_file.TRAINING, tasks=tasks, workers=workers, owners={"shared": {"missing": 2}})
    return made


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_values(status):
    lines = render(status.copy()).splitlines()
    for line in (
        'k4p1_run{state="training"} 1.0',
        'k4p1_steps_total{task="digits"} 5.0',
        'k4p1_steps_target{task="digits"} 10.0',
        'k4p1_loss{task="digits"} 0.5',
        'k4p1_examples_per_second{task="digits"} 64.0',
        'k4p1_validation{task="digits",metric="accuracy"} 0.75',
        'k4p1_workers{state="lost"} 1.0',
        'k4p1_workers{state="working"} 2.0',
        'k4p1_missing_updates_total{owner="shared"} 2.0',
    ):
        assert line in lines
    assert not any("staleness" in line for line in lines)  # not measured yet


def test_the_format(status):
    """Each sample belongs to a family that is declared before it."""
    status.update(tasks={"digits": {"loss": float("nan")}})
    declared = set()
    for line in render(status.copy()).splitlines():
        if line.startswith("# TYPE "):
            declared.add(line.split()[2])
            assert line.split()[3] in ("counter", "gauge")
        elif not line.startswith("# HELP "):
            found = re.fullmatch(r'(\w+)\{\w+="[^"]*"(,\w+="[^"]*")*\} (-?[\d.e+-]+|nan|inf|-inf)', line)
            assert found and found[1] in declared, line


def test_over_http(status):
    port = free_port()
    with metrics_server(status, port):
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30)
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert answer.read().decode() == render(status.copy())
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30)
        with pytest.raises(errors.ConfigError, match=f"metrics_port={port} cannot be used"), metrics_server(status, port):
            pass
    with metrics_server(status, port), metrics_server(status, None):  # free again
        pass
