"""The `ray up` file: valid by Ray's schema, and taken by Ray's launcher, against an EC2 that moto plays."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
import yaml
from jsonschema import Draft7Validator
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND

from tests.cluster.composed import ROOT
from tests.cluster.manifests import CLUSTER

AWS = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def mistakes(tree: Any) -> list[str]:
    return [error.message for error in Draft7Validator(SCHEMA).iter_errors(tree)]


def test_it_is_valid() -> None:
    assert mistakes(AWS) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.update(max_worker=3), "max_worker"),
        (lambda tree: tree["available_node_types"]["gpu"].update(min_workers="4"), "'4'"),
        (lambda tree: tree["available_node_types"]["head"].pop("node_config"), "node_config"),
        (lambda tree: tree["auth"].update(user="ubuntu"), "user"),
        (lambda tree: tree.update(setup_commands="pip"), "pip"),
    ],
)
def test_a_broken_one_is_refused(change, said: str) -> None:
    tree = copy.deepcopy(AWS)
    change(tree)
    (mistake,) = mistakes(tree)
    assert said in mistake


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The file as Ray's launcher completes it before it starts machines."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # for the key pair that it makes
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        boto3.client("iam").create_instance_profile(InstanceProfileName="corun-ray")
        config = prepare_config(copy.deepcopy(AWS))
        validate_config(config)
        yield bootstrap_aws(config)


def test_rays_launcher_takes_it(launcher: dict[str, Any]) -> None:
    """Instance types are real ones, with what they have; the requests for machines are as EC2 wants them."""
    types = AWSNodeProvider.fillout_available_node_types_resources(launcher)["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["head"]["resources"]["CPU"] == types["pool"]["resources"]["CPU"] == 0, "no task runs there"
    provider = AWSNodeProvider(launcher["provider"], launcher["cluster_name"])
    for name, node_type in types.items():
        image = {"ImageId": boto3.client("ec2").describe_images()["Images"][0]["ImageId"]}
        provider.create_node(node_type["node_config"] | image, {TAG_RAY_NODE_KIND: name}, 1)
    instances = [one for all in boto3.client("ec2").describe_instances()["Reservations"] for one in all["Instances"]]
    assert {one["InstanceType"]: one.get("InstanceLifecycle") for one in instances} == {
        "m7i.2xlarge": None,
        "g6.4xlarge": "spot",
        "r7i.2xlarge": None,
    }


def test_only_ssh_is_open_to_the_outside(launcher: dict[str, Any]) -> None:
    nodes = [node_type["node_config"] for node_type in launcher["available_node_types"].values()]
    groups = {group for node in nodes for group in node["SecurityGroupIds"]}
    (group,) = boto3.client("ec2").describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
    open_ports = {rule.get("FromPort") for rule in group["IpPermissions"] if rule["IpRanges"]}
    assert open_ports == {22}
    assert "--dashboard-host=127.0.0.1" in " ".join(AWS["head_start_ray_commands"])


def test_nodes_share_the_token_and_this_checkout() -> None:
    mounts = AWS["file_mounts"]
    assert mounts["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert mounts["/home/ubuntu/corun_ray"] == "."
    for commands in (AWS["head_start_ray_commands"], AWS["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in commands[-1]
    named = " ".join(AWS["setup_commands"]).split()
    assert "requirements-image.lock" in named and (ROOT / "requirements-image.lock").exists()
