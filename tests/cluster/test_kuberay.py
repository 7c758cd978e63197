"""The Kubernetes manifests: valid, of one mind with each other, with the image and with the job they run."""

import shlex
from pathlib import PurePosixPath
from typing import Any

import pytest
import ray
import yaml

from corun_ray.config.jobs import ColabatorJob
from corun_ray.config.loading import load_jobs
from tests.cluster.composed import ROOT
from tests.cluster.manifests import CLUSTER, PROJECT, documents, mistakes_of_kind, plain, rendered, walk

FOLDER = CLUSTER / "kuberay"
FILES = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.name not in ("kustomization.yaml", "gcs.yaml")]
(RAYCLUSTER,) = documents(FOLDER / "base" / "raycluster.yaml")
(RAYJOB,) = documents(FOLDER / "rayjob.yaml")
SECRETS = {one["metadata"]["name"]: one["stringData"] for one in documents(FOLDER / "secrets.example.yaml")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_are_valid(path) -> None:
    for manifest in documents(path):
        assert mistakes_of_kind(manifest) == []


@pytest.mark.parametrize("folder", ["base", "redis"])
def test_what_kustomize_makes_of_them_is_valid(folder: str) -> None:
    objects = rendered(folder)
    for manifest in objects:
        assert mistakes_of_kind(manifest) == []
    (cluster,) = [one for one in objects if one["kind"] == "RayCluster"]
    assert ("gcsFaultToleranceOptions" in cluster["spec"]) == (folder == "redis")
    assert len(cluster["spec"]["workerGroupSpecs"]) == 3, "the overlay only adds"


def put(tree: Any, path: str, value: Any) -> None:
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in way:
        tree = tree[part]
    tree[last] = value


POD = "spec/workerGroupSpecs/0/template/spec"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", "spec/headGroupSpecs", {}),
        ("RayCluster", "spec/authOptions/mode", "tokn"),
        ("RayCluster", "spec/authOptions/secret", "x"),
        ("RayCluster", "spec/enableInTreeAutoscaling", "true"),
        ("RayCluster", "spec/workerGroupSpecs/0/minReplicas", "4"),
        ("RayCluster", "spec/workerGroupSpecs/0/maxReplica", 4),
        ("RayCluster", "spec/workerGroupSpecs/1/rayStartParams/num-cpus", 0),
        ("RayCluster", f"{POD}/containers/0/limits", {}),
        ("RayCluster", f"{POD}/containers/0/resources/limits/cpu", ["4"]),
        ("RayCluster", f"{POD}/containers/0/readinessProbe/httpGet/uri", "/"),
        ("RayCluster", f"{POD}/volumes/0/ephemeral/volumeClaimTemplate/spec/size", "1Gi"),
        ("RayJob", "spec/entryPoint", "x"),
        ("RayJob", "spec/submissionMode", "k8s"),
        ("RayJob", "spec/runtimeEnvYAML", {"env_vars": {}}),
        ("Secret", "stringdata", {}),
        ("ConfigMap", "data/PORT", 1),
        ("Service", "spec/ports/0/port", "6379"),
        ("StatefulSet", "spec/template/spec/containers/0/env/0/valueFrom/secretKeyRef/secret", "x"),
        ("StatefulSet", "apiVersion", "v1"),
    ],
)
def test_a_broken_manifest_is_refused(kind: str, path: str, value: Any) -> None:
    every = [one for file in FILES for one in documents(file) if one["kind"] == kind]
    manifest = plain(every[0])
    put(manifest, path, value)
    (mistake, *_) = mistakes_of_kind(manifest)
    assert mistake.partition(":")[0] in path


def test_what_is_missing_is_refused() -> None:
    manifest = plain(RAYCLUSTER)
    del manifest["spec"]["headGroupSpec"]["template"]
    assert mistakes_of_kind(manifest) == ["spec/headGroupSpec: 'template' is a required property"]


def groups() -> dict[str, dict[str, Any]]:
    spec = RAYCLUSTER["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (one,) = group["template"]["spec"]["containers"]
    return one


def test_every_secret_and_setting_that_is_named_is_declared() -> None:
    (settings,) = documents(FOLDER / "base" / "environment.yaml")
    redis = [one for name in ("gcs.yaml", "redis.yaml") for one in documents(FOLDER / "redis" / name)]
    found = 0
    for key, value in walk([RAYCLUSTER, RAYJOB, *redis]):
        if key == "secretKeyRef":
            assert value["key"] in SECRETS[value["name"]]
        elif key == "secretRef":
            assert SECRETS[value["name"]]
        elif key == "configMapRef":
            assert value["name"] == settings["metadata"]["name"]
        elif key == "secretName":
            assert list(SECRETS[value]) == ["auth_token"], "KubeRay looks for this key"
        else:
            continue
        found += 1
    assert found >= 12
    assert {value for one in SECRETS.values() for value in one.values()} == {"REPLACE"}, "no secret is in the checkout"


def test_token_authentication_is_on() -> None:
    assert RAYCLUSTER["spec"]["authOptions"]["mode"] == "token"


def test_one_image_of_one_version() -> None:
    assert {container(group)["image"] for group in groups().values()} == {f"corun-ray:{PROJECT['version']}"}
    assert RAYCLUSTER["spec"]["rayVersion"] == ray.__version__


def test_groups_are_apart_and_within_bounds() -> None:
    limits = {name: container(group)["resources"] for name, group in groups().items()}
    assert {name for name, one in limits.items() if "nvidia.com/gpu" in one["limits"]} == {"gpu"}
    assert all(one["limits"] == one["requests"] for one in limits.values())
    idle = {name for name, group in groups().items() if group["rayStartParams"].get("num-cpus") == "0"}
    assert idle == {"head", "pool"}, "no task may ask for a CPU there"
    for name, group in groups().items():
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container(group)[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        if name != "head":
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            spill = group["rayStartParams"]["object-spilling-directory"]
            mounts = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
            assert mounts[spill] in {volume["name"] for volume in group["template"]["spec"]["volumes"]}


def test_the_job_is_one_that_the_image_holds_and_the_cluster_can_run() -> None:
    program, *arguments = shlex.split(RAYJOB["spec"]["entrypoint"])
    path = PurePosixPath(program).relative_to("/opt/corun_ray")
    assert "WORKDIR /opt/corun_ray\n" in (ROOT / "Dockerfile").read_text()
    assert (ROOT / path).stat().st_mode & 0o111, "KubeRay runs it as it is"
    assert arguments[::2] == ["--set"] * (len(arguments) // 2)
    (settings,) = documents(FOLDER / "base" / "environment.yaml")
    environment = settings["data"] | yaml.safe_load(RAYJOB["spec"]["runtimeEnvYAML"])["env_vars"]
    (job,) = load_jobs(ROOT / path, arguments[1::2], environment)
    assert isinstance(job, ColabatorJob)
    assert job.data.clear == "s3://my-bucket/data/clear" and job.storage == "s3://my-bucket/runs"
    assert job.network.init == "models:/corun-pretrained@champion"
    gpu, pool = groups()["gpu"], groups()["pool"]
    # GPUs come for the job, and as many as it may use.
    assert (gpu["minReplicas"], gpu["maxReplicas"]) == (0, job.cluster.max_workers)
    assert job.pool.shards == pool["replicas"]
    assert RAYJOB["spec"]["clusterSelector"] == {"ray.io/cluster": RAYCLUSTER["metadata"]["name"]}


def test_the_overlay_finds_its_redis() -> None:
    (overlay,) = documents(FOLDER / "redis" / "gcs.yaml")
    service, store = documents(FOLDER / "redis" / "redis.yaml")
    name, port = overlay["spec"]["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    (exposed,) = service["spec"]["ports"]
    assert (service["metadata"]["name"], exposed["port"]) == (name, int(port))
    assert service["spec"]["selector"].items() <= store["spec"]["template"]["metadata"]["labels"].items()
    ports = {one["name"]: one["containerPort"] for one in store["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert exposed["targetPort"] in ports
    assert overlay["metadata"]["name"] == RAYCLUSTER["metadata"]["name"]
