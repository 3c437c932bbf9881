"""Who is who: TF_CONFIG, Slurm, --local_cluster."""

import json

import pytest

from k4p1 import errors
from k4p1.cluster import spec

CLUSTER = {"chief": ["a:1"], "ps": ["b:1", "b:2"], "worker": ["c:1"]}


def config(**changes):
    return {"cluster": CLUSTER, "task": {"type": "ps", "index": 1}, **changes}


def test_tf_config_is_read(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", json.dumps(config()))
    found = spec.from_environment()
    assert (found.job, found.index, found.address, found.name) == ("ps", 1, "b:2", "parameter server 1")
    assert json.loads(found.as_tf_config()) == config()
    assert found.of("chief", 0).name == "coordinator"


def test_without_tf_config_there_is_no_cluster(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", " ")
    assert spec.from_environment() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no 'cluster'"),
        (json.dumps(config(cluster={**CLUSTER, "wroker": ["d:1"]})), "did you mean 'worker'"),
        (json.dumps(config(cluster={**CLUSTER, "ps": []})), "no address for 'ps'"),
        (json.dumps(config(cluster={"chief": ["a:1"], "ps": ["b:1"]})), "no address for 'worker'"),
        (json.dumps(config(cluster={**CLUSTER, "worker": ["c"]})), "address 'c' of 'worker'; expected 'host:port'"),
        (json.dumps(config(cluster={**CLUSTER, "worker": ["c:99999"]})), "expected 'host:port'"),
        (json.dumps(config(cluster={**CLUSTER, "chief": ["a:1", "a:2"]})), "one coordinator"),
        (
            json.dumps(config(cluster={**CLUSTER, "worker": ["c:1", "b:2"]})),
            "parameter server 1 and worker 1 have the same address b:2; give each its own",
        ),
        (json.dumps(config(cluster={**CLUSTER, "ps": ["b:1", "b:1"]})), "parameter server 0 and parameter server 1 have"),
        (json.dumps(config(task={"type": "evaluator"})), "no task type"),
        (json.dumps(config(task={"type": "ps", "index": 2})), "task index 2 of 'ps'; allowed are 0 to 1"),
        (json.dumps(config(task={"type": "ps", "index": "0"})), "task index '0'"),
    ],
)
def test_malformed_tf_config(monkeypatch, text, message):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(errors.ConfigError, match=message) as caught:
        spec.from_environment()
    assert "\n" not in str(caught.value)


def test_counts():
    assert spec.parse_counts("ps:1,workers:2", "--x", ("ps", "worker")) == {"ps": 1, "worker": 2}
    assert spec.parse_counts(" worker=3 , ps=2", "--x", ("ps", "worker")) == {"ps": 2, "worker": 3}


@pytest.mark.parametrize(
    "text", ["", "ps:1", "ps:0,workers:1", "ps:1,workers:x", "ps:1,ps:2,workers:1", "servers:1,workers:2"]
)
def test_malformed_counts(text):
    with pytest.raises(errors.ConfigError, match=r"--local_cluster=.*ps:1,workers:2"):
        spec.parse_counts(text, "--local_cluster", ("ps", "worker"))


def test_local_addresses_are_distinct():
    found = spec.on_this_machine(2, 3)
    addresses = [address for job in found.jobs.values() for address in job]
    assert len(set(addresses)) == 6 and all(address.startswith("127.0.0.1:") for address in addresses)


@pytest.mark.parametrize(
    ("rank", "gpus", "role"),
    [(0, "", ("chief", 0)), (1, "", ("ps", 0)), (2, "", ("worker", 0)), (5, "", ("worker", 3)), (4, "2", ("worker", 2))],
)
def test_slurm_step(monkeypatch, rank, gpus, role):
    """A made-up step: two nodes with three tasks each."""
    step = {"PROCID": rank, "STEP_NUM_TASKS": 6, "STEP_NODELIST": "node[1-2]", "STEP_TASKS_PER_NODE": "3(x2)"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
    if gpus:
        with pytest.raises(errors.ConfigError, match="Slurm"):  # two GPUs do not divide among three tasks of a node
            spec.from_slurm(1, 9000)
        return
    found = spec.from_slurm(1, 9000)
    assert (found.job, found.index) == role
    assert found.jobs == {
        "chief": ("node1:9000",),
        "ps": ("node1:9001",),
        "worker": ("node1:9002", "node2:9000", "node2:9001", "node2:9002"),
    }


def test_slurm_with_gpus(monkeypatch):
    step = {"PROCID": 3, "STEP_NUM_TASKS": 4, "STEP_NODELIST": "n1", "STEP_TASKS_PER_NODE": "4", "GPUS_ON_NODE": 4}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = spec.from_slurm(1)
    import os

    assert (found.job, found.index, os.environ["CUDA_VISIBLE_DEVICES"]) == ("worker", 1, "3")


@pytest.mark.parametrize(("tasks", "message"), [(None, "start it with srun"), ("2", "2 tasks; a coordinator, 1 parameter")])
def test_no_slurm_step(monkeypatch, tasks, message):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    if tasks:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    with pytest.raises(errors.ConfigError, match=message):
        spec.from_slurm(1)
