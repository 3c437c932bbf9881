"""The processes of a local cluster have a network of their own, where the system allows it."""

import os
import socket
import subprocess
import sys

import pytest

from k4p1.cluster import network_namespace
from k4p1.cluster.network_namespace import Namespace

pytestmark = pytest.mark.processes

SERVE = """
from k4p1.cluster.network_namespace import enter_if_told
enter_if_told()
import os, socket
server = socket.create_server(("0.0.0.0", 0))
port = server.getsockname()[1]
socket.create_connection(("127.0.0.1", port)).close()
print(port, os.getuid(), flush=True)
server.accept()
server.accept()
"""


def test_nobody_outside_reaches_what_listens_inside(monkeypatch):
    with Namespace() as namespace:
        if namespace.why_not:
            pytest.skip(f"no network namespace here: {namespace.why_not}")
        environment = {**os.environ, **namespace.environment()}
        told = environment[network_namespace.VARIABLE]
        inside = subprocess.Popen([sys.executable, "-c", SERVE], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            port, user = map(int, inside.stdout.readline().split())
            assert user == os.getuid()
            with pytest.raises(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
        finally:
            inside.kill()
            inside.wait()
            inside.stdout.close()
    monkeypatch.setenv(network_namespace.VARIABLE, told)
    with pytest.raises(OSError):  # it went with its launcher
        network_namespace.enter_if_told()


def test_it_may_be_left_out(monkeypatch):
    monkeypatch.setenv(network_namespace.VARIABLE, network_namespace.OPEN)
    with Namespace() as namespace:
        assert namespace.environment() == {} and namespace.why_not == "K4P1_NETWORK_NAMESPACE=open"
    network_namespace.enter_if_told()  # `open` names no process


def test_a_system_that_does_not_allow_it_is_quoted(monkeypatch):
    monkeypatch.setattr(network_namespace.sys, "executable", "/bin/echo")
    with Namespace() as namespace:
        assert namespace.environment() == {} and namespace.why_not


def test_a_namespace_that_is_gone_is_not_passed_over(monkeypatch):
    monkeypatch.setenv(network_namespace.VARIABLE, "net=/proc/999999999/fd/3")
    with pytest.raises(OSError):
        network_namespace.enter_if_told()
