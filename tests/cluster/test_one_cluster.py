"""Properties of stores, steps, groups and pipelines, looked at on one cluster of real processes; see `driver.py`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
PS = [f"/job:ps/replica:0/task:{i}/device:CPU:0" for i in range(2)]


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, str(pathlib.Path(__file__).with_name("driver.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DRIVER_LIMIT": "560"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def experiment(found, request):
    result = found[request.param]
    assert not isinstance(result, dict) or "traceback" not in result, result["traceback"]
    return result


@pytest.mark.parametrize("experiment", ["optimizers"], indirect=True)
def test_fifty_updates_are_those_of_keras(experiment):
    assert set(experiment) == {"sgd", "momentum", "nesterov", "rmsprop", "rmsprop_momentum", "adam", "adamw"}
    assert max(experiment.values()) < 1e-5, experiment


@pytest.mark.parametrize("experiment", ["tickets"], indirect=True)
def test_tickets_are_given_out_once_and_end_at_the_target(experiment):
    assert experiment["unique"] and experiment["done"] == {"t": 300} and experiment["refused"] == 20
    assert experiment["tf_variable"] == 300


@pytest.mark.parametrize("experiment", ["tickets"], indirect=True)
def test_canary_keras_loses_updates(experiment):
    """`keras.Variable.assign_add` reads, then writes. If this fails, Keras has mended it, and its counters may be shared."""
    assert experiment["keras_variable"] < 10 * 300


@pytest.mark.parametrize("experiment", ["one_worker"], indirect=True)
def test_one_worker_learns_what_one_machine_learns(experiment):
    assert experiment["difference"] < 1e-4
    assert experiment["moved"] > 0.01


@pytest.mark.parametrize("experiment", ["kinds"], indirect=True)
def test_a_step_of_every_kind_on_servers_is_the_step_of_one_machine(experiment):
    assert len(experiment) == 10
    for spec, found in experiment.items():
        assert found["difference"] < 1e-4 and found["moved"] > 0, spec


@pytest.mark.parametrize("experiment", ["groups_of_workers"], indirect=True)
def test_steps_are_exact_and_taken_by_the_right_workers(experiment):
    assert experiment["own"]["workers"] == {"a": [0], "b": [1]}
    assert experiment["shared"]["workers"] == {"a": [0], "b": [1], "c": [0]}
    assert experiment["two_for_one"]["workers"] == {"a": [0, 1]}
    for run in experiment.values():
        assert set(run["done"].values()) == {60}
        assert set(run["missing"].values()) == {0}
        for name, updates in run["updates"].items():
            assert updates == 60 * (len(run["done"]) if ".shared." in name else 1), name
        assert run["traced"] == len(run["done"])  # one graph a task
        assert run["kinds"] == ["train", "workers"]


@pytest.mark.parametrize("experiment", ["groups_of_workers"], indirect=True)
def test_staleness_is_measured(experiment):
    """Two workers on one vector: some step meets an update of the other."""
    assert experiment["two_for_one"]["staleness"] >= 1


@pytest.mark.parametrize("experiment", ["devices"], indirect=True)
def test_a_step_computes_where_the_worker_likes_and_updates_on_the_servers(experiment):
    """Nothing is pinned to a worker's CPU, so that on a worker with a GPU all but input runs there."""
    for placed in experiment.values():
        assert placed["on_cpu_of_worker"] == []
        assert set(placed["devices"]) == {"", *PS}
        assert set(placed["updates_on"]) <= set(PS) and placed["updates_on"]
        assert set(placed["captured_from"]) <= set(PS)  # nothing comes from the coordinator


@pytest.mark.parametrize("experiment", ["frozen_weights"], indirect=True)
def test_frozen_weights_stay_with_the_worker_and_do_not_move(experiment):
    assert experiment == {"fixed_groups": 1, "unmoved": True, "difference": 0.0}


@pytest.mark.parametrize("experiment", ["bad_worker"], indirect=True)
def test_task_and_worker_of_bad_values_are_named(experiment):
    assert (
        experiment["nan"].startswith("DivergedError: task 'b', step ")
        and "on worker 1: the loss is nan" in experiment["nan"]
    )
    assert experiment["data"].startswith("DataError: task 'b' on worker 1: ") and "label out of range" in experiment["data"]


@pytest.mark.parametrize("experiment", ["pipelines"], indirect=True)
def test_workers_draw_different_batches_and_do_not_replay_them(experiment):
    """Worker 1 is killed after some steps and started again."""
    assert experiment["common"] == 0
    assert experiment["repeated"] == [0, 0]
    assert min(experiment["steps"]) > 20 and experiment["after_the_kill"] > 0
    assert experiment["first_of_local"]  # the first worker draws what one machine draws


@pytest.mark.parametrize("experiment", ["borrowing"], indirect=True)
def test_a_task_without_workers_borrows_one_or_stops_the_run(experiment):
    assert experiment["borrow"]["a"] == [0] and 0 in experiment["borrow"]["b"]
    assert experiment["done"] == {"a": 400, "b": 400}
    assert experiment["interrupted"].get("b", 0) <= 1
    assert max(experiment["missing"].values()) <= sum(experiment["interrupted"].values())
    assert "task 'b' has had no live worker for 0.3 s" in experiment["stop"] and "borrow_workers" in experiment["stop"]


@pytest.mark.parametrize("experiment", ["silence"], indirect=True)
def test_a_worker_that_falls_silent_after_its_step_stops_nobody_else(experiment):
    assert experiment["steps_meanwhile"] > 1
    assert set(experiment["done"].values()) == {700} and set(experiment["missing"].values()) == {0}


@pytest.mark.parametrize("experiment", ["stores"], indirect=True)
def test_a_later_store_takes_the_place_of_the_copies_that_workers_keep(experiment):
    """Each further copy would add 33 MB."""
    assert experiment[-1] - experiment[1] < 60, experiment
