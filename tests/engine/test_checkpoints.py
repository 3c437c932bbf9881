"""Checkpoints: whole or not there, the newest good one, the last few."""

import logging

import numpy as np
import pytest

from k4p1 import errors
from k4p1.engine.checkpoints import Checkpoints

STATE = {"vector/a": np.arange(5, dtype=np.float32), "ticket/a": np.int64(3)}


def test_last_ones_and_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        checkpoints.save(step, STATE, {"step": step})
    checkpoints.save_best(STATE, {"step": 2})
    assert [p.name for p in checkpoints.paths()] == ["step_00000010.safetensors", "step_00000002.safetensors"]
    assert checkpoints.newest().progress == {"step": 10}
    assert checkpoints.best().progress == {"step": 2}
    np.testing.assert_array_equal(checkpoints.newest().state["vector/a"], STATE["vector/a"])
    assert int(checkpoints.newest().state["ticket/a"]) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, {"step": 1})
    path = checkpoints.save(2, STATE, {"step": 2})
    content = bytearray(path.read_bytes())
    content = content[:-4] if damage == "truncated" else content
    content[-3] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "k4p1"):
        assert checkpoints.newest().progress == {"step": 1}
    assert "step_00000002" in caplog.text and "damaged" in caplog.text


def test_the_checkpoint_just_written_stays_whatever_else_is_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(100, STATE, {"step": 100}).write_bytes(b"damaged")
    assert checkpoints.newest() is None
    for step in (80, 90):
        path = checkpoints.save(step, STATE, {"step": step})
        assert checkpoints.paths() == [path] and checkpoints.newest().progress == {"step": step}
    checkpoints.save(200, STATE, {"step": 200})
    path = checkpoints.save(95, STATE, {"step": 95})  # one that counts as older stays, too
    assert path in checkpoints.paths()
    assert (tmp_path / "step_00000100.damaged").exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, STATE, {"step": 1})
    for name in (".step_00000002.safetensors.x1.partial", ".best.safetensors.x2.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert checkpoints.newest().progress == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_of_another_run_are_refused(tmp_path):
    Checkpoints(tmp_path, run="one").save(1, STATE, {})
    with pytest.raises(errors.ConfigError, match="another configuration"):
        Checkpoints(tmp_path, run="two").newest()


def test_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "none").newest() is None
    assert Checkpoints(tmp_path / "none").best() is None
