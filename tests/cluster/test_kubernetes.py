"""Manifests: valid by the schemas of Kubernetes, closed to other pods, and TF_CONFIG as each role needs it."""

import json
import os
import subprocess

import kubernetes_validate
import pytest
import yaml

from k4p1 import errors
from k4p1.cli import main
from k4p1.cluster import spec
from k4p1.cluster.kubernetes import ClusterJob, Resources, manifests, objects

JOB = {
    "name": "run1",
    "image": "registry.example/k4p1:1",
    "command": "train",
    "flags": ["--gin_file=quickstart", "--gin_bindings=patch = 'head'"],
    "model_dir": "/model",
    "claim": "data",
    "servers": 2,
    "workers": 3,
}


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("gpus", [0, 1])
def test_schemas(version, gpus):
    text = manifests(ClusterJob(**JOB, resources=Resources("500m", "2Gi", gpus)))
    kinds = []
    for document in yaml.safe_load_all(text):
        kubernetes_validate.validate(document, version, strict=True)
        kinds.append(document["kind"])
    assert kinds == ["Service", "NetworkPolicy", "StatefulSet", "StatefulSet", "Job"]


def pods():
    for one in objects(ClusterJob(**JOB)):
        if one["kind"] in ("StatefulSet", "Job"):
            yield one, one["spec"]["template"]


def test_every_role_gets_the_tf_config_of_its_pod(monkeypatch, tmp_path):
    """The shell in the pod is run with a stand-in for k4p1 that prints what it is given."""
    (tmp_path / "k4p1").write_text('#!/bin/sh\nprintf "%s\\n" "$TF_CONFIG" "$@"\n')
    (tmp_path / "k4p1").chmod(0o755)
    found = []
    for one, template in pods():
        container = template["spec"]["containers"][0]
        given = {e["name"]: e["value"] for e in container["env"] if "value" in e}
        for index in range(one["spec"].get("replicas", 1)):
            environment = {
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                **given,
                "POD_NAME": f"{one['metadata']['name']}-{index}",
            }
            command = [*container["command"], *container["args"]]
            printed = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            monkeypatch.setenv("TF_CONFIG", printed[0])
            role = spec.from_environment()
            found.append((role.job, role.index, role.address))
            assert printed[1] == ("train" if role.job == "chief" else "join")
            assert printed[-1] == "--gin_bindings=patch = 'head'"
    assert found == [
        ("ps", 0, "run1-ps-0.run1:2222"),
        ("ps", 1, "run1-ps-1.run1:2222"),
        ("worker", 0, "run1-worker-0.run1:2222"),
        ("worker", 1, "run1-worker-1.run1:2222"),
        ("worker", 2, "run1-worker-2.run1:2222"),
        ("chief", 0, "run1-coordinator.run1:2222"),
    ]


def test_only_pods_of_the_run_reach_the_ports():
    everything = objects(ClusterJob(**JOB))
    policy = next(one for one in everything if one["kind"] == "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    (source,) = rule["from"]
    labels = source["podSelector"]["matchLabels"]
    assert policy["podSelector"]["matchLabels"] == labels and rule["ports"] == [{"protocol": "TCP", "port": 2222}]
    assert "namespaceSelector" not in source
    for _, template in pods():
        assert labels.items() <= template["metadata"]["labels"].items()


def test_all_pods_share_the_volume_and_request_resources():
    for one, template in pods():
        container = template["spec"]["containers"][0]
        assert container["volumeMounts"] == [{"name": "model", "mountPath": "/model", "subPath": "run1"}]
        assert "--model_dir=/model" in container["args"]
        assert container["resources"]["requests"] == {"cpu": "2", "memory": "4Gi"}
        assert one["metadata"]["labels"] == {"k4p1/run": "run1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": "Run_1"}, "lower case"), ({"claim": ""}, "lower case"), ({"model_dir": "model"}, "absolute path")],
)
def test_bad_names(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        ClusterJob(**{**JOB, **changes})


@pytest.mark.parametrize("resources", [("two", "4Gi"), ("2", "4 GB"), ("", "1Gi")])
def test_bad_resources(resources):
    with pytest.raises(errors.ConfigError, match="expected"):
        Resources(*resources)


def test_command(capsys, tmp_path):
    assert main.main(["manifest", "--image", "k4p1:1", "--ps", "2", "--workers", "8"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [d["spec"]["replicas"] for d in documents if d["kind"] == "StatefulSet"] == [2, 8]
    (tmp_path / "bad.gin").write_text("train.steps = ")
    assert main.main(["manifest", "--image", "k4p1:1", "--gin_file", str(tmp_path / "bad.gin")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("k4p1: gin cannot read") and printed.err.count("\n") == 1
    coordinator = json.loads(documents[-1]["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"])
    assert len(coordinator["cluster"]["worker"]) == 8
