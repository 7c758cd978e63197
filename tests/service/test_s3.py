"""The S3 store: where it is, and what it is asked."""

import os
import pickle

import boto3
import pytest
from pyarrow import fs

from corun_ray.service.doctor.places import try_storage
from corun_ray.service.s3 import (
    DRIVER_ENDPOINT,
    SINGLE_REQUEST_BYTES,
    make_node_environment,
    read_s3_settings,
    share_s3_endpoint,
)
from corun_ray.service.storage import MissingFile, StorageError, locate
from tests.role_s3 import RoleS3

CONFIG = """\
[profile private]
region = eu-west-1
endpoint_url = http://profile:9000

[profile split]
services = ours
endpoint_url = http://profile:9000

[services ours]
s3 =
  endpoint_url = http://services:9000
"""


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Choose a profile of `CONFIG`, in an environment without an endpoint."""
    (tmp_path / "config").write_text(CONFIG)
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_PROFILE", DRIVER_ENDPOINT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    locate.cache_clear()
    yield lambda name: monkeypatch.setenv("AWS_PROFILE", name)
    locate.cache_clear()


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({"AWS_PROFILE": "private"}, "http://profile:9000"),
        ({"AWS_PROFILE": "split"}, "http://services:9000"),
        ({"AWS_PROFILE": "split", "AWS_ENDPOINT_URL": "http://all:1"}, "http://all:1"),
        (
            {"AWS_PROFILE": "split", "AWS_ENDPOINT_URL": "http://all:1", "AWS_ENDPOINT_URL_S3": "http://s3:1"},
            "http://s3:1",
        ),
        ({"AWS_PROFILE": "private", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, None),
        ({"AWS_ENDPOINT_URL": "http://all:1", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, None),
        ({}, None),
        ({DRIVER_ENDPOINT: "http://driver:1"}, "http://driver:1"),
        ({DRIVER_ENDPOINT: "http://driver:1", "AWS_PROFILE": "private"}, "http://profile:9000"),
    ],
)
def test_the_endpoint_is_the_one_of_boto3(profile, monkeypatch, environment, endpoint):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_s3_settings().endpoint_url == endpoint
    if DRIVER_ENDPOINT not in environment:
        used = boto3.session.Session().client("s3", "us-east-1").meta.endpoint_url
        assert used == endpoint or (endpoint is None and used.endswith("amazonaws.com"))


def test_pyarrow_and_the_clock_ask_the_endpoint_of_the_profile(profile):
    """Requests that were signed for a private store went to Amazon."""
    profile("private")
    store = locate("s3://haze/runs").filesystem.handler
    assert store.endpoint_url == "http://profile:9000"
    assert (store.options["endpoint_override"], store.options["region"]) == ("http://profile:9000", "eu-west-1")
    assert (
        locate("s3://haze/runs?endpoint_override=minio:1&scheme=http").filesystem.handler.endpoint_url
        == "http://minio:1"
    )


def test_other_nodes_are_told_what_only_the_profile_says(profile, monkeypatch):
    profile("private")
    assert make_node_environment()[DRIVER_ENDPOINT] == "http://profile:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all:1")
    assert DRIVER_ENDPOINT not in make_node_environment()


def test_mlflow_on_another_node_asks_the_store_of_the_driver(profile, monkeypatch):
    monkeypatch.setenv(DRIVER_ENDPOINT, "http://driver:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")  # Restored at the end.
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    share_s3_endpoint()
    assert boto3.session.Session().client("s3", "us-east-1").meta.endpoint_url == "http://driver:1"
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    profile("private")
    share_s3_endpoint()
    assert "AWS_ENDPOINT_URL_S3" not in os.environ, "the node has settings of its own"


def test_a_profile_that_does_not_exist_is_one_line(profile):
    profile("nobody")
    with pytest.raises(StorageError, match=r"^cannot open s3://haze/a: the AWS configuration .* \(nobody\) "):
        locate("s3://haze/a")
    assert make_node_environment() == {}


@pytest.fixture
def role(s3_server, monkeypatch):
    """A store that grants what lies below `corp/team/alice`, where `data/a.png` and a secret beside it are."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="corp")
    for key in ("team/alice/data/a.png", "team/bob/secret"):
        client.put_object(Bucket="corp", Key=key, Body=b"bytes")
    locate.cache_clear()
    with RoleS3(s3_server, "corp", "team/alice") as role:
        monkeypatch.setenv("AWS_ENDPOINT_URL", role.url)
        yield role
    locate.cache_clear()
    for found in client.list_objects_v2(Bucket="corp")["Contents"]:
        client.delete_object(Bucket="corp", Key=found["Key"])


def test_a_role_for_one_prefix_reads_writes_lists_and_deletes(role, tmp_path, monkeypatch):
    monkeypatch.setattr("corun_ray.service.doctor.places.TRIAL_MIB", 1)
    place = locate("s3://corp/team/alice")
    assert place.exists() and not locate("s3://corp/team/alice/none").exists()
    assert place.list_files() == ["data/a.png"]
    with pytest.raises(MissingFile, match="^cannot list s3://corp/team/alice/none: no such folder$"):
        place.child("none").list_files()
    assert not try_storage(place).keeps_versions

    # What Ray does with checkpoints: many files in threads, from C++.
    for number in range(20):
        (tmp_path / f"{number}.bin").write_bytes(b"x" * (SINGLE_REQUEST_BYTES + 1 if number == 0 else 10))
    place.filesystem.create_dir(f"{place.path}/copy")
    fs.copy_files(str(tmp_path), f"{place.path}/copy", destination_filesystem=place.filesystem)
    assert len(place.child("copy").list_files()) == 20
    place.child("copy").delete()
    assert place.list_folders() == ["data"]

    # Of the prefix itself the role may know nothing but what lies below.
    assert set(role.denied) == {"HEAD /corp/team/alice"}
    with pytest.raises(StorageError, match="cannot read s3://corp/team/bob/secret: .*ACCESS_DENIED"):
        locate("s3://corp/team/bob/secret").read()


def test_a_small_file_is_one_request_and_folders_are_none(role):
    place = pickle.loads(pickle.dumps(locate("s3://corp/team/alice/runs")))
    place.child("a/b/c.txt").write(b"text")
    assert role.asked == ["PUT /corp/team/alice/runs/a/b/c.txt"]


def test_keys_that_cannot_be_read_are_named(s3_server):
    client = boto3.client("s3")
    client.create_bucket(Bucket="odd")
    for key in ("fine/a b%20c?d#é.png", "data//b.png", "data/c.png", "data/./d.png"):
        client.put_object(Bucket="odd", Key=key, Body=key.encode())
    with pytest.raises(StorageError, match=r"^cannot list s3://odd/data: 2 keys have .* \('\./d\.png'\); rename them"):
        locate("s3://odd/data").list_files()
    assert locate("s3://odd/data").list_folders() == []

    # Any other is read, and its URI leads back to it.
    (name,) = locate("s3://odd/fine").list_files()
    child = locate("s3://odd/fine").child(name)
    assert child.read() == locate(child.uri).read() == child.read_range(0, 99) == f"fine/{name}".encode()


def test_a_trial_sees_that_a_bucket_keeps_versions(s3_server, monkeypatch):
    monkeypatch.setattr("corun_ray.service.doctor.places.TRIAL_MIB", 1)
    client = boto3.client("s3")
    client.create_bucket(Bucket="versions")
    client.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    assert try_storage(locate("s3://versions/runs")).keeps_versions
