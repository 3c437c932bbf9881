"""The run's side of a cluster: what it does when the process that coordinates hangs, dies, fails or must stop."""

import multiprocessing
import os
import re
import signal
import threading
import types

import pytest

from k4p1 import errors
from k4p1.cluster import supervisor
from k4p1.cluster.coordinator import Order
from k4p1.cluster.coordinator_process import CoordinatorProcess
from k4p1.cluster.link import Link, LinkedReporter
from k4p1.cluster.policy import WorkerPolicy
from k4p1.cluster.step_counts import StepCounts
from k4p1.cluster.supervisor import Supervisor
from k4p1.engine.checkpoints import Checkpoints
from k4p1.engine.reporting import Reporter
from k4p1.engine.stop_signal import StopSignal, ends_on_sigterm

TRAINED = {"g": [1.0, 2.0]}


class Coordinating:
    """In place of a process: each start plays the next of some parts in a thread, at the other end of the link."""

    def __init__(self, *parts):
        self._parts, self.orders, self.ended = list(parts), [], 0

    def start(self):
        ours, theirs = multiprocessing.Pipe()
        part = self._parts.pop(0)

        def play():
            link = Link(theirs)
            self.orders.append(link.receive(10.0)[1][0])
            part(link)
            link.flush(10.0)

        threading.Thread(target=play, daemon=True).start()
        return Link(ours)

    def end(self):
        self.ended += 1
        return -9


def trains(link):
    LinkedReporter(link).progress({"a": 7})
    link.send("trained", TRAINED, StepCounts({"a": {}}, {}), {"a": 2})


def hangs(link):
    link.send("pulse", "connecting", 0.0)


def dies(link):
    link.send("pulse", "tracing", 0.0)
    link.flush(10.0)
    link.close()


def is_stuck(link):
    link.send("pulse", "training", 1e6)


def fails(kind, text):
    return lambda link: link.send("failed", kind, text)


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Makes a supervisor of a run with one task, whose coordinating processes play the given parts."""
    monkeypatch.setattr(supervisor, "_LONGEST_PAUSE_SECONDS", 0.0)

    def make(*parts, checkpoints=True):
        task = types.SimpleNamespace(
            name="a", steps=10, pure=types.SimpleNamespace(groups=()), metrics={}, calibration=None, validation=None
        )
        process = Coordinating(*parts)
        made = Supervisor(
            process,
            WorkerPolicy(silence_timeout_s=0.5),
            [task],
            [],
            Reporter({"a": 10}, quiet=True),
            Checkpoints(tmp_path) if checkpoints else None,
            Order("hash", {}),
        )
        return made, process

    return make


def test_a_run_is_trained(supervised):
    trainer, process = supervised(trains)
    assert trainer.run() == TRAINED
    assert trainer.progress.skipped == {"a": 2} and trainer.step_counts.steps == {"a": {}}
    assert process.orders == [Order("hash", {})]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (hangs, "silent for .* while connecting"),
        (dies, "ended while tracing .exit -9."),
        (is_stuck, "has been training for"),
        (fails(errors.ServerLostError, "a parameter server is lost"), "a parameter server is lost"),
    ],
)
def test_another_process_takes_over_whatever_happens(supervised, part, said):
    trainer, process = supervised(lambda link: (LinkedReporter(link).progress({"a": 3}), part(link)), trains)
    events = []
    trainer._reporter.message = events.append
    assert trainer.run() == TRAINED
    assert re.search(f"{said}.*; returning to the newest checkpoint", events[0])
    assert process.orders[1] == Order("hash", {"a": 3}, None, again=True)
    assert process.ended >= 2


@pytest.mark.parametrize("kind", [errors.DataError, errors.DivergedError, errors.ClusterError])
def test_what_no_restart_mends_ends_the_run_at_once(supervised, kind):
    trainer, process = supervised(fails(kind, "task 'a': its own line"))
    with pytest.raises(kind, match=r"^task 'a': its own line$"):
        trainer.run()
    assert len(process.orders) == 1


def test_restarts_are_counted_in_a_row(supervised, monkeypatch):
    monkeypatch.setattr(supervisor, "_MOST_RESTARTS", 2)
    lost = fails(errors.ServerLostError, "a parameter server is lost")
    counts = iter(range(1, 20))

    def gets_on(link):
        LinkedReporter(link).progress({"a": next(counts)})
        lost(link)

    trainer, _ = supervised(*[gets_on] * 6, trains)
    assert trainer.run() == TRAINED  # progress in between: more than two are no reason to give up
    trainer, process = supervised(*[lost] * 4)
    with pytest.raises(errors.ClusterError, match="given up after 2 restarts in a row"):
        trainer.run()
    assert len(process.orders) == 3


def test_without_checkpoints_there_is_nothing_to_return_to(supervised):
    trainer, _ = supervised(dies, checkpoints=False)
    with pytest.raises(errors.ClusterError, match="ended while tracing"):
        trainer.run()


@pytest.mark.parametrize("heeds", [True, False])
def test_a_stop_ends_a_process_that_hangs(supervised, monkeypatch, heeds):
    monkeypatch.setattr(supervisor, "_STOP_SECONDS", 0.3)
    monkeypatch.setattr(supervisor, "StopSignal", Caught)

    def part(link):
        link.send("saved", "saved at step 5")
        assert link.receive(10.0) == ("stop", (15,))
        if heeds:
            link.send("failed", errors.Preempted, "saved at step 9")

    trainer, process = supervised(part)
    said = "saved at step 9" if heeds else "saved at step 5; the same call resumes there"
    with pytest.raises(errors.Preempted, match=said):
        trainer.run()
    assert process.ended


def test_a_stop_during_the_last_evaluation_ends_the_run(supervised, monkeypatch):
    monkeypatch.setattr(supervisor, "StopSignal", Caught)
    trainer, _ = supervised(lambda link: (link.send("saved", "saved at step 10"), trains(link)))
    with pytest.raises(errors.Preempted, match="saved at step 10"):
        trainer.run()


class Caught(StopSignal):
    def __enter__(self):
        self.caught = 15
        return self


def test_a_process_that_uses_tensorflow_cannot_be_copied(monkeypatch):
    monkeypatch.setattr("k4p1.cluster.coordinator_process.has_started", lambda: True)
    with pytest.raises(errors.ConfigError, match="train before anything else uses TensorFlow"):
        CoordinatorProcess(print)


@pytest.mark.processes
def test_copies_are_made_and_ended(monkeypatch):
    """Two in turn, though this process may have threads: the copy that copies was made before."""
    monkeypatch.setattr("k4p1.cluster.coordinator_process.has_started", lambda: False)

    def coordinate(link):
        link.send("pid", os.getpid(), link.receive(10.0))
        link.receive(None)

    process = CoordinatorProcess(coordinate)
    pids = []
    for number in range(2):
        link = process.start()
        link.send("begin", number)
        name, (pid, received) = link.receive(10.0)
        assert (name, received) == ("pid", ("begin", (number,))) and pid == process.pid
        pids.append(pid)
    assert process.end() == -9 and process.end() is None
    with pytest.raises(EOFError):
        while link.receive(10.0):
            pass
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_sigterm_outside_of_training_ends_a_run_in_order():
    """While a run finishes, no loop looks at a `StopSignal`."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(errors.Preempted, match="the same call resumes"), ends_on_sigterm():
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.caught == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
