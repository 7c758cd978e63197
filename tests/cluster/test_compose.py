"""The compose files: valid, closed to the outside, without secrets, of one mind with the image and the jobs."""

import re
from typing import Any

import pytest
import yaml

from corun_ray.config.loading import load_jobs
from tests.cluster.composed import COMPOSE, EXAMPLE, ROOT, VARIABLE, services, variables
from tests.cluster.manifests import CLUSTER, PROJECT, mistakes, plain
from tests.cluster.test_dockerfile import stages, values

TREE = yaml.safe_load(COMPOSE.read_text())
VALUES = {name: f"value-of-{name}" for name in variables()}
SERVICES = services(VALUES)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_valid(name: str) -> None:
    assert mistakes(yaml.safe_load((CLUSTER / name).read_text()), "compose.json") == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("services/mlflow/imge", "x"),
        ("services/mlflow/command", 5),
        ("services/mlflow/depends_on/postgres/condition", "healthy"),
        ("services/mlflow/healthcheck/cmd", "x"),
        ("services/mlflow/ports", "5000"),
        ("services/ray-head/build/arg", {}),
        ("service", {}),
        ("volumes/s3-data", "here"),
    ],
)
def test_a_broken_compose_file_is_refused(path: str, value: Any) -> None:
    tree = plain(TREE)
    *way, last = path.split("/")
    at = tree
    for part in way:
        at = at[part]
    at[last] = value
    assert mistakes(tree, "compose.json")


def test_everything_is_published_on_loopback_alone() -> None:
    ports = [port for service in TREE["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    for port in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
    assert not any({"network_mode", "privileged", "expose"} & set(one) for one in TREE["services"].values())


def test_variables_come_from_the_example_and_secrets_from_nowhere_else() -> None:
    used = {found[2]: found[3] for found in VARIABLE.finditer(COMPOSE.read_text()) if found[2]}
    assert set(used) == set(variables())
    secret = {name for name in used if re.search("TOKEN|KEY|PASSWORD", name)}
    assert len(secret) == 4
    for name in secret:
        assert variables()[name] == "", "no secret is in the checkout"
        assert used[name] == "?", "compose stops where it is not set"
    for name in secret:
        with pytest.raises(KeyError, match=name):
            services(VALUES | {name: ""})
    assert "/cluster/compose.env\n" in (ROOT / ".gitignore").read_text()
    for service in SERVICES.values():
        words = " ".join([*service.command, *(service.health or [])])
        assert "value-of" not in words, "a secret on a command line, for all of the machine's users to see"


def test_every_service_is_watched_and_comes_back() -> None:
    for name, service in TREE["services"].items():
        assert service["restart"] == ("on-failure" if name == "bucket" else "unless-stopped")
        assert ("healthcheck" in service) == (name != "bucket")
        for needed, how in service.get("depends_on", {}).items():
            condition = "service_completed_successfully" if needed == "bucket" else "service_healthy"
            assert how == {"condition": condition}
    mounted = [mount.split(":")[0] for service in TREE["services"].values() for mount in service.get("volumes", [])]
    assert sorted(mounted) == sorted(TREE["volumes"]), "each volume has one user"


def test_images() -> None:
    ours = f"corun-ray:{PROJECT['version']}"
    images = {name: service["image"] for name, service in TREE["services"].items()}
    assert {name for name, image in images.items() if image == ours} == {"ray-head", "ray-worker", "bucket", "mlflow"}
    assert all(re.fullmatch(r"[a-z-]+(/[a-z-]+)?:v?\d[\w.]*", image) for image in images.values()), "no version"
    build = TREE["services"]["ray-head"]["build"]
    assert (COMPOSE.parent / build["context"] / "Dockerfile").exists()
    arguments = {value.split("=")[0] for stage in stages() for value in values("ARG", stage)}
    assert set(build["args"]) <= arguments
    assert variables()["ACCELERATOR"] in ("gpu", "cpu")


def test_token_authentication_is_on() -> None:
    for name in ("ray-head", "ray-worker"):
        environment = SERVICES[name].environment
        assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", VALUES["RAY_AUTH_TOKEN"])


def test_names_and_ports_that_services_call_each_other_by() -> None:
    ray, s3, mlflow = SERVICES["ray-head"], SERVICES["s3"], SERVICES["mlflow"]
    assert ray.environment["AWS_ENDPOINT_URL"] == mlflow.environment["AWS_ENDPOINT_URL"] == "http://s3:7070"
    assert s3.command[:2] == ["--port", ":7070"] and s3.health[-1] == "http://127.0.0.1:7070/health"
    assert ray.environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000" and "--port=5000" in mlflow.command
    assert "--address=ray-head:6379" in SERVICES["ray-worker"].command and "--port=6379" in ray.command
    assert "mlflow:5000" in mlflow.command[-1], "MLflow refuses requests to names that it does not know"
    store = mlflow.environment["MLFLOW_BACKEND_STORE_URI"]
    # SQLAlchemy 2.1 takes psycopg 3 where no driver is named; the image has psycopg2.
    assert store == f"postgresql+psycopg2://mlflow:{VALUES['POSTGRES_PASSWORD']}@postgres:5432/mlflow"
    postgres = SERVICES["postgres"].environment
    assert (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"]) == ("mlflow", "mlflow")
    (bucket,) = re.findall(r'create_bucket\(Bucket="(\w+)"\)', SERVICES["bucket"].command[-1])
    for uri in (ray.environment["CORUN_DATA"], ray.environment["CORUN_STORAGE"]):
        assert uri.startswith(f"s3://{bucket}/")


@pytest.mark.parametrize("name", ["colabator", "pretrain"])
def test_jobs_find_everything_in_the_environment(name: str) -> None:
    (job,) = load_jobs(ROOT / "jobs" / f"{name}.yaml", [], SERVICES["ray-worker"].environment)
    assert (job.storage, job.data.clear) == ("s3://corun/runs", "s3://corun/data/clear")
    assert job.tracking.uri == "http://mlflow:5000"


def test_the_gpu_file_adds_to_a_service_that_exists() -> None:
    added = yaml.safe_load((CLUSTER / "compose.gpu.yaml").read_text())
    assert list(added["services"]) == ["ray-worker"] and "ray-worker" in TREE["services"]


def test_the_example_says_where_to_copy_it() -> None:
    assert "cluster/compose.env" in EXAMPLE.read_text()
