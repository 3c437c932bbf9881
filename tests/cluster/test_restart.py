"""The coordinator that begins anew after a server was lost."""

import os
import sys

import pytest

from k4p1 import errors
from k4p1.cluster import restart


def test_the_same_command_resumes(monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: called.append(arguments))
    monkeypatch.setattr(sys, "argv", ["k4p1", "train", "--noresume", "--model_dir", "m"])
    monkeypatch.delenv("K4P1_RESTARTS", raising=False)
    restart.start_again(errors.ServerLostError("a parameter server is lost"))
    assert called == [[sys.executable, "-m", "k4p1", "train", "--noresume", "--model_dir", "m", "--resume"]]
    assert os.environ.pop("K4P1_RESTARTS") == "1"


def test_not_for_ever(monkeypatch):
    monkeypatch.setenv("K4P1_RESTARTS", "20")
    with pytest.raises(errors.ServerLostError, match="given up after 20 restarts") as caught:
        restart.start_again(errors.ServerLostError("a parameter server is lost"))
    assert caught.value.exit_code == 75
