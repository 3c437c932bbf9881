"""Manifests: valid by the schemas of Kubernetes, what reviewers ask for, and TF_CONFIG as each role needs it."""

import json
import os
import subprocess

import kubernetes_validate
import pytest
import yaml

from k4p1 import errors
from k4p1.cli import main
from k4p1.cluster import spec
from k4p1.cluster.kubernetes import ClusterJob, Resources, Scheduling, kustomize_base, manifests, objects

JOB = {
    "name": "run1",
    "image": "registry.example/k4p1:1",
    "command": "train",
    "flags": ["--gin_file=quickstart.gin", "--gin_bindings=patch = 'head'"],
    "model_dir": "/model",
    "claim": "data",
    "servers": 2,
    "workers": 3,
    "config": {"quickstart.gin": "steps = 3\npatch = 'head'\n", "parts/base.gin": "seed = 1\n"},
}
FULL = {
    **JOB,
    "resources": Resources("500m", "2Gi", 1, "2", "512Mi", "1Gi"),
    "scheduling": Scheduling(["pool=gpu"], ["gpu=yes:NoSchedule", "spot:NoExecute"], ["registry"]),
    "data_claim": "sets",
    "namespace": "team",
}


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("given", [JOB, FULL], ids=["plain", "full"])
def test_schemas(version, given):
    kinds = []
    for document in yaml.safe_load_all(manifests(ClusterJob(**given))):
        kubernetes_validate.validate(document, version, strict=True)
        kinds.append(document["kind"])
    assert kinds == ["ConfigMap", "Service", "NetworkPolicy", "Job", "Job", "Job"]


def jobs(given=JOB):
    return [one for one in objects(ClusterJob(**given)) if one["kind"] == "Job"]


def pods(given=JOB):
    return [one["spec"]["template"]["spec"] for one in jobs(given)]


def containers(given=JOB):
    return [pod["containers"][0] for pod in pods(given)]


def test_every_role_gets_the_tf_config_of_its_pod(monkeypatch, tmp_path):
    """The shell in the pod is run with a stand-in for k4p1 that prints what it is given."""
    (tmp_path / "k4p1").write_text('#!/bin/sh\nprintf "%s\\n" "$TF_CONFIG" "$@"\n')
    (tmp_path / "k4p1").chmod(0o755)
    found = []
    for one in jobs():
        container = one["spec"]["template"]["spec"]["containers"][0]
        given = {e["name"]: e["value"] for e in container["env"]}
        for index in range(one["spec"]["completions"]):
            environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given, "JOB_COMPLETION_INDEX": str(index)}
            command = [*container["command"], *container["args"]]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            printed = ran.stdout.splitlines()
            monkeypatch.setenv("TF_CONFIG", printed[0])
            role = spec.from_environment()
            host = f"{one['metadata']['name']}-{index}"  # the pod's host name, which the Job gives
            assert role.address == f"{host}.run1:2222"
            found.append((role.job, role.index))
            assert printed[1] == ("train" if role.job == "chief" else "join")
            assert printed[-1] == "--gin_bindings=patch = 'head'"
    assert found == [("ps", 0), ("ps", 1), ("worker", 0), ("worker", 1), ("worker", 2), ("chief", 0)]


def test_addresses_are_names_that_service_and_jobs_give():
    for one in jobs():
        assert one["spec"]["completionMode"] == "Indexed" and one["spec"]["template"]["spec"]["subdomain"] == "run1"
        assert one["spec"]["parallelism"] == one["spec"]["completions"]
    service = next(one for one in objects(ClusterJob(**JOB)) if one["kind"] == "Service")
    assert service["metadata"]["name"] == "run1" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True


def test_pods_reach_each_other_and_dns_only():
    everything = objects(ClusterJob(**JOB))
    policy = next(one for one in everything if one["kind"] == "NetworkPolicy")["spec"]
    own = [{"podSelector": policy["podSelector"]}]
    grpc = [{"protocol": "TCP", "port": 2222}]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["ingress"] == [{"from": own, "ports": grpc}]
    inside, dns = policy["egress"]
    assert inside == {"to": own, "ports": grpc} and {port["port"] for port in dns["ports"]} == {53}
    labels = policy["podSelector"]["matchLabels"]
    for one in jobs():
        assert labels.items() <= one["spec"]["template"]["metadata"]["labels"].items()


def test_pods_have_no_rights_and_a_root_that_cannot_be_written():
    for pod, container in zip(pods(), containers(), strict=True):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0 and security["fsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"} and pod["automountServiceAccountToken"] is False
        inner = container["securityContext"]
        assert inner["readOnlyRootFilesystem"] and not inner["privileged"] and not inner["allowPrivilegeEscalation"]
        assert inner["capabilities"] == {"drop": ["ALL"]}
        writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert writable == {"/model", "/tmp", "/dev/shm"}
        assert {"name": "HOME", "value": "/tmp"} in container["env"]


def test_volumes_resources_probes_and_labels():
    for pod, container in zip(pods(), containers(), strict=True):
        mounted = {m["name"] for m in container["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]} == {"model", "gin", "tmp", "shm"}
        shm = next(v for v in pod["volumes"] if v["name"] == "shm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
        assert "--model_dir=/model" in container["args"]
        assert container["resources"] == {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)
    roles = [one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] for one in jobs()]
    assert roles == ["ps", "worker", "coordinator"]
    for one in objects(ClusterJob(**JOB)):
        assert one["metadata"]["labels"]["app.kubernetes.io/instance"] == "run1" and "namespace" not in one["metadata"]


def test_what_is_asked_for_is_there():
    full = objects(ClusterJob(**FULL))
    assert {one["metadata"]["namespace"] for one in full} == {"team"}
    for pod, container in zip(pods(FULL), containers(FULL), strict=True):
        assert pod["nodeSelector"] == {"pool": "gpu"} and pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["tolerations"] == [
            {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},
            {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
        ]
        assert {"name": "data", "mountPath": "/data", "readOnly": True} in container["volumeMounts"]
        assert {"name": "TFDS_DATA_DIR", "value": "/data"} in container["env"]
        assert container["resources"]["limits"]["cpu"] == "2"
    gpus = ["nvidia.com/gpu" in c["resources"]["limits"] for c in containers(FULL)]
    assert gpus == [False, True, False]


def test_evictions_count_as_no_failure_and_all_ends_with_the_run():
    for one, role in zip(jobs(), ("ps", "worker", "coordinator"), strict=True):
        first, *others = one["spec"]["podFailurePolicy"]["rules"]
        assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        assert [rule["onExitCodes"]["values"] for rule in others] == ([[1, 2]] if role == "coordinator" else [])
        assert one["spec"]["ttlSecondsAfterFinished"] == 86400
        assert one["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # a policy for failures needs it


def test_gin_files_are_where_their_flags_say():
    (config,) = [one for one in objects(ClusterJob(**JOB)) if one["kind"] == "ConfigMap"]
    assert config["data"] == {"quickstart.gin": JOB["config"]["quickstart.gin"], "parts__base.gin": "seed = 1\n"}
    for pod, container in zip(pods(), containers(), strict=True):
        volume = next(v for v in pod["volumes"] if v["name"] == "gin")["configMap"]
        assert volume["name"] == config["metadata"]["name"]
        assert {"key": "parts__base.gin", "path": "parts/base.gin"} in volume["items"]
        mount = next(m for m in container["volumeMounts"] if m["name"] == "gin")
        assert container["workingDir"] == mount["mountPath"] and mount["readOnly"]


def test_a_kustomize_base():
    files = kustomize_base(ClusterJob(**FULL))
    base = yaml.safe_load(files["kustomization.yaml"])
    assert base["kind"] == "Kustomization" and base["resources"] == ["manifest.yaml"] and base["namespace"] == "team"
    assert files["manifest.yaml"] == manifests(ClusterJob(**FULL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Run_1"}, "name='Run_1': expected up to 42 lower case"),
        ({"claim": ""}, "lower case"),
        ({"namespace": "a b"}, "namespace='a b'"),
        ({"data_claim": "A"}, "data_claim='A'"),
        ({"model_dir": "model"}, "absolute path"),
        ({"user": 0}, "must not run as root"),
        ({"config": {"a.gin": "#" * 1_000_001}}, "1,000,001 bytes; a ConfigMap holds 1,000,000"),
    ],
)
def test_bad_jobs(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        ClusterJob(**{**JOB, **changes})


@pytest.mark.parametrize(
    "resources", [("two", "4Gi"), ("2", "4 GB"), ("", "1Gi"), ("2", "1Gi", 0, "x"), ("2", "1Gi", 0, "", "1 G")]
)
def test_bad_resources(resources):
    with pytest.raises(errors.ConfigError, match="expected"):
        Resources(*resources)


@pytest.mark.parametrize("scheduling", [(["pool"],), ([], ["gpu"]), ([], ["gpu:Never"]), ([], [], ["A b"])])
def test_bad_scheduling(scheduling):
    with pytest.raises(errors.ConfigError, match="expected"):
        Scheduling(*scheduling)


class TestCommand:
    def run(self, capsys, *arguments):
        code = main.main(["manifest", "--image", "k4p1:1", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    def refused(self, capsys, *arguments):
        code, out, err = self.run(capsys, *arguments)
        assert code == 1 and out == "" and err.count("\n") == 1
        return err

    def test_counts_and_the_own_gin_file_with_what_it_includes(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "base.gin").write_text("include 'quickstart.gin'\nsteps = 7\n")
        (tmp_path / "mine.gin").write_text("include 'base.gin'\nseed = 5\n")
        code, out, _ = self.run(capsys, "--ps", "2", "--workers", "8", "--gin_file", str(tmp_path / "mine.gin"))
        assert code == 0
        documents = list(yaml.safe_load_all(out))
        assert [d["spec"]["completions"] for d in documents if d["kind"] == "Job"] == [2, 8, 1]
        assert set(documents[0]["data"]) == {"mine.gin", "base.gin", "quickstart.gin"}
        container = documents[-1]["spec"]["template"]["spec"]["containers"][0]
        assert "--gin_file=mine.gin" in container["args"]
        assert len(json.loads(container["env"][0]["value"].replace("__INDEX__", "0"))["cluster"]["worker"]) == 8

    def test_the_pod_reads_what_the_manifest_carries(self, capsys, tmp_path, monkeypatch):
        """Both have the same hash, by which coordinator and workers compare."""
        from k4p1.cli import gin_files

        own, pod = tmp_path / "own", tmp_path / "pod"
        own.mkdir()
        pod.mkdir()
        (own / "mine.gin").write_text("include 'quickstart.gin'\nseed = 5\n")
        _, out, _ = self.run(capsys, "--gin_file", str(own / "mine.gin"))
        config = next(iter(yaml.safe_load_all(out)))
        for key, text in config["data"].items():
            (pod / key).write_text(text)
        there = gin_files.configuration([str(own / "mine.gin")], [])
        monkeypatch.chdir(pod)
        assert gin_files.configuration(["mine.gin"], []) == there

    def test_a_base_in_a_folder(self, capsys, tmp_path):
        code, out, _ = self.run(capsys, "--kustomize", str(tmp_path / "base"))
        assert code == 0 and out == f"kubectl apply -k {tmp_path}/base\n"
        assert {path.name for path in (tmp_path / "base").iterdir()} == {"kustomization.yaml", "manifest.yaml"}

    @pytest.mark.parametrize(
        "binding", ["digits/Task.data = '/home/me/digits'", "Task.data_dir = '~/sets'", "mobilenet_v2.weights = './w.h5'"]
    )
    def test_paths_that_no_pod_has(self, capsys, binding):
        said = self.refused(capsys, "--gin_bindings", binding)
        assert said.startswith(f"k4p1: --gin_bindings: {binding.split(' =')[0]} is '") and "a path that no pod has" in said

    def test_a_folder_beside_the_caller_is_none_of_a_pod(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "flowers").mkdir()
        assert "Task.data is 'flowers', a path" in self.refused(capsys, "--gin_bindings", "digits/Task.data = 'flowers'")

    def test_paths_that_pods_have(self, capsys):
        given = [
            "--gin_bindings",
            "digits/Task.data = '/data/digits'",
            "--gin_bindings",
            "mobilenet_v2.weights = '/opt/w/a.h5'",
        ]
        assert self.run(capsys, *given, "--data_claim", "sets", "--image_path", "/opt/w")[0] == 0
        assert "pods have /k4p1/model, /opt/w" in self.refused(capsys, *given, "--image_path", "/opt/w")

    def test_too_few_workers(self, capsys):
        assert "2 tasks need at least 2 workers, the cluster has 1" in self.refused(capsys, "--workers", "1")
        assert self.run(capsys, "--workers", "1", "--gin_bindings", "train.share_workers = True")[0] == 0
        said = self.refused(capsys, "--workers", "3", "--gin_bindings", "digits/Task.workers = 3")
        assert "need at least 4 workers, the cluster has 3" in said

    def test_two_files_of_one_name(self, capsys, tmp_path):
        for folder, text in (("a", "include 'quickstart.gin'\n"), ("b", "steps = 3\n")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "x.gin").write_text(text)
        files = [part for folder in "ab" for part in ("--gin_file", str(tmp_path / folder / "x.gin"))]
        assert "two gin files are named x.gin" in self.refused(capsys, *files)

    def test_an_include_that_no_pod_has(self, capsys, tmp_path):
        (tmp_path / "base.gin").write_text("include 'quickstart.gin'\n")
        (tmp_path / "mine.gin").write_text(f"include '{tmp_path}/base.gin'\n")
        assert "an absolute path or one outside" in self.refused(capsys, "--gin_file", str(tmp_path / "mine.gin"))

    def test_a_bad_file(self, capsys, tmp_path):
        (tmp_path / "bad.gin").write_text("train.steps = ")
        assert self.refused(capsys, "--gin_file", str(tmp_path / "bad.gin")).startswith("k4p1: gin cannot read")
