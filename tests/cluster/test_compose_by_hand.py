"""The commands of cluster/compose.yaml, started as they stand there, and two jobs through Ray's Jobs API on them."""

import json
import secrets
from collections.abc import Iterator

import pytest

from tests.cluster.by_hand import Stack, missing, with_a_store
from tests.cluster.composed import ROOT, services, variables

pytestmark = pytest.mark.slow

SMALL = {
    "data.patch_px": 64,
    "network.stages": 2,
    "network.width": 8,
    "optim.precision": "fp32",
    "train.steps": 6,
    "train.batch_per_worker": 2,
    "train.log_every": 2,
    "train.checkpoint_every": 3,
    "train.validate_every": 6,
    "train.validation_images": 1,
    "cluster.workers": 1,
    "cluster.gpus_per_worker": 0,
    "cluster.cpus_per_worker": 1,
    "cluster.data_cpus": 1,
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    if reason := missing():
        pytest.skip(reason)
    values = {name: secrets.token_hex(16) for name in variables()}
    with Stack(with_a_store(services(values))) as stack:
        yield stack


def submit(stack: Stack, job: str, *overrides: str, **environment: str):
    """`ray job submit` as cluster/README.md has it, from the head, whose loopback compose publishes."""
    small = [f"{key}={value}" for key, value in SMALL.items()]
    settings = [argument for value in [*small, *overrides] for argument in ("--set", value)]
    command = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", str(ROOT)]
    return stack.inside("ray-head", *command, "--", f"jobs/{job}.yaml", *settings, **environment)


def mlflow(stack: Stack, path: str, **query: str) -> dict:
    """What MLflow's REST API answers to the Ray nodes."""
    url = f"http://mlflow:5000/api/2.0/mlflow/{path}?" + "&".join(f"{name}={value}" for name, value in query.items())
    done = stack.inside("ray-worker", "wget", "--quiet", "--output-document=-", url)
    assert done.returncode == 0, stack.log("mlflow")[-2000:]
    return json.loads(done.stdout)


def test_pretraining_then_colabator(stack: Stack, tmp_path) -> None:
    demo = tmp_path / "demo"
    assert stack.inside("ray-worker", "python3", "-m", "corun_ray", "demo", str(demo)).returncode == 0
    copy = f"from pyarrow import fs; fs.copy_files('{demo}', 's3://corun/data')"
    assert stack.inside("ray-worker", "python3", "-c", copy).returncode == 0

    pretrain = submit(stack, "pretrain", "data.depth=s3://corun/data/depth")
    assert "succeeded" in pretrain.stdout, pretrain.stdout[-3000:] + pretrain.stderr[-2000:]
    init = "network.init=models:/corun-pretrained@champion"
    colabator = submit(stack, "colabator", "data.depth=s3://corun/data/depth", init)
    assert "succeeded" in colabator.stdout, colabator.stdout[-3000:] + colabator.stderr[-2000:]

    model = mlflow(stack, "registered-models/alias", name="corun", alias="champion")["model_version"]
    run = mlflow(stack, "runs/get", run_id=model["run_id"])["run"]
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["artifact_uri"].startswith("mlflow-artifacts:")
    stored = "from pyarrow import fs; store, path = fs.FileSystem.from_uri('s3://corun')\n"
    stored += "print(*(file.path for file in store.get_file_info(fs.FileSelector(path, recursive=True))))"
    files = stack.inside("ray-worker", "python3", "-c", stored).stdout.split()
    assert [file for file in files if file.startswith("corun/mlflow/") and file.endswith("/network.pth")]
    assert [file for file in files if file.startswith("corun/runs/") and "/step_" in file]


@pytest.mark.parametrize("token", ["wrong", ""])
def test_without_the_token_no_job(stack: Stack, token: str) -> None:
    refused = submit(stack, "colabator", RAY_AUTH_TOKEN=token)
    assert refused.returncode != 0 and "succeeded" not in refused.stdout
    assert "oken" in refused.stdout + refused.stderr


def test_without_the_key_no_file(stack: Stack) -> None:
    if "moto.server" in stack.services["s3"].command:
        pytest.skip("moto stands in for the store, and checks no keys")
    listing = ("python3", "-c", "import boto3; boto3.client('s3').list_objects_v2(Bucket='corun')")
    assert stack.inside("ray-worker", *listing).returncode == 0
    assert stack.inside("ray-worker", *listing, AWS_SECRET_ACCESS_KEY="wrong").returncode != 0
