"""The doctor on a healthy stack, and on one with something broken: each is named."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

import boto3
import pytest
from ray.exceptions import GetTimeoutError

from corun_ray.config.jobs import ClusterSection
from corun_ray.service.doctor.doctor import Doctor, Finding, Needs, collect_needs
from corun_ray.service.doctor.nodes import ClusterNodes, NodeTrouble
from corun_ray.service.doctor.places import EXPERIMENT, TRIAL_MIB, measure_server_clocks, try_storage
from corun_ray.service.errors import JobFailed
from corun_ray.service.storage import Location, StorageError, locate
from tests.conftest import free_port
from tests.jobtexts import COLABATOR, PRETRAIN, load

LOOKS = ["driver", "ray", "gpus", "workers", "storage", "mlflow", "weights", "clock"]


def examined(needs: Needs) -> dict[str, Finding]:
    return {finding.name: finding for finding in Doctor(needs).examine()}


@pytest.fixture(scope="module")
def bucket(s3_server: str) -> str:
    boto3.client("s3").create_bucket(Bucket="doctor")
    return "s3://doctor/runs"


@pytest.fixture
def needs(local_ray, bucket, tmp_path) -> Needs:
    return Needs(bucket, f"sqlite:///{tmp_path}/mlflow.db")


def test_a_healthy_stack_is_all_ok_and_nothing_stays_behind(needs):
    found = examined(needs)
    assert [*found] == LOOKS
    assert [name for name, finding in found.items() if finding.is_ok is False] == [], [*map(str, found.values())]
    assert [name for name, finding in found.items() if finding.is_ok is None] == ["gpus", "weights"]
    assert "token authentication on" in found["ray"].text, "as Ray has it for what it starts here"
    assert "2 workers on 1 node: 64 MiB summed by gloo" in found["workers"].text
    assert "from here and 1 node: write" in found["storage"].text
    assert "the object store" in found["clock"].text
    assert locate(needs.storage).list_files() == []


@contextmanager
def server_that_says(date: str | None) -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(200)
            if date is not None:
                self.send_header("Date", date)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_five_broken_things_are_named_each_with_what_to_do(needs, tmp_path, monkeypatch):
    monkeypatch.setenv("CORUN_STORAGE_PATIENCE_S", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server_that_says("Mon, 02 Mar 2020 10:00:00 GMT") as wrong_clock:
        broken = Needs(
            storage="s3://no-such-bucket/runs",
            tracking=wrong_clock,
            size=ClusterSection(workers=(2, 2), gpus_per_worker=1),
            weights={str(tmp_path): {"vgg19-dcbb9e9d.pth": "loss.perceptual vgg19"}},
        )
        found = examined(broken)
    said = {name: str(finding) for name, finding in found.items()}
    assert [name for name, one in found.items() if one.is_ok is False] == LOOKS[2:], said
    assert all(f"{'':<13} -> " in said[name] for name in LOOKS[2:])
    assert "the job asks for 2 GPUs, Ray has 0" in said["gpus"]
    assert "2 GPUs are needed in all, Ray has 0" in said["workers"]
    assert "no-such-bucket" in said["storage"] and "AWS_ENDPOINT_URL" in said["storage"]
    assert "does not answer as MLflow" in said["mlflow"]
    assert "vgg19-dcbb9e9d.pth" in said["weights"] or "weights.json" in said["weights"]
    assert "MLflow -" in said["clock"] and "NTP" in said["clock"]
    assert not any("Traceback" in text for text in said.values())


def test_a_cluster_that_is_not_there_is_named_and_the_rest_is_looked_at(needs, monkeypatch):
    def no_cluster(*sizes: ClusterSection) -> str:
        from corun_ray.service.cluster.connect import ClusterError

        raise ClusterError("RAY_ADDRESS: no Ray cluster at 127.0.0.1:1")

    monkeypatch.setattr("corun_ray.service.doctor.doctor.connect", no_cluster)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        assert "does it know your token" in examined(needs)["ray"].advice
    found = examined(needs)
    assert "of a head that runs" in found["ray"].advice
    assert [name for name, one in found.items() if one.is_ok is False] == ["ray"]
    assert found["workers"].is_ok is None and found["gpus"].text == "not looked at without Ray"
    assert found["storage"].is_ok and "from here:" in found["storage"].text


def test_a_local_ray_that_cannot_start_is_named_and_the_rest_is_looked_at(needs, monkeypatch):
    def no_ray(*sizes: ClusterSection) -> str:
        raise JobFailed("a local Ray does not start: timed out")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("corun_ray.service.doctor.doctor.connect", no_ray)
    found = examined(needs)
    assert [*found] == LOOKS and "timed out" in found["ray"].text and "RAY_TMPDIR" in found["ray"].advice
    assert found["storage"].is_ok and found["mlflow"].is_ok


def test_a_node_that_does_not_tell_its_time_is_named(monkeypatch):
    def no_answer(reference: object, timeout: float) -> float:
        raise GetTimeoutError("Get timed out: some object(s) not ready.")

    monkeypatch.setattr("corun_ray.service.doctor.nodes.ray.get", no_answer)
    nodes = ClusterNodes.__new__(ClusterNodes)
    nodes._probes = {"10.0.0.7": MagicMock()}
    with pytest.raises(NodeTrouble, match="10.0.0.7 does not answer: Get timed out"):
        nodes.measure_clocks()


class Forgetful(Location):
    """Storage whose reads give other bytes."""

    def read(self) -> bytes:
        return b"other"

    def child(self, relative: str) -> Location:
        place = super().child(relative)
        return type(self)(place.uri, place.filesystem, place.path)


def test_storage_that_gives_back_other_bytes_is_not_trusted(tmp_path):
    place = locate(str(tmp_path))
    with pytest.raises(StorageError, match="gives back other bytes"):
        try_storage(Forgetful(place.uri, place.filesystem, place.path))
    assert [*tmp_path.iterdir()] == []


def test_the_trial_is_of_the_size_that_its_help_says():
    from corun_ray.cli.run import doctor

    assert f"{TRIAL_MIB} MiB" in doctor.__doc__ and EXPERIMENT in doctor.__doc__


def test_servers_that_do_not_answer_have_no_clock():
    assert measure_server_clocks("runs", f"http://127.0.0.1:{free_port()}") == {}
    assert measure_server_clocks("runs", "sqlite:///mlflow.db") == {}
    assert measure_server_clocks("s3://haze//runs", "sqlite:///mlflow.db") == {}
    with server_that_says(None) as without_date:
        assert measure_server_clocks("runs", without_date) == {}


def test_the_needs_of_a_file_are_those_of_its_jobs_together(tmp_path):
    small = f"{PRETRAIN}storage: /one\ncluster: {{workers: 2}}\n"
    large = f"{COLABATOR}cluster: {{workers: [4, 8]}}\nloss: {{perceptual: vgg19, weights: /w}}\n"
    found = collect_needs(load(tmp_path, f"{small}---\n{large}"))
    assert (found.storage, found.tracking) == ("/one", "sqlite:////one/mlflow.db")
    assert found.size.min_workers == 4
    assert [*found.weights] == ["/w"]
    assert found.replace_places("s3://b", None).storage == "s3://b"
    assert found.replace_places(None, "http://m").tracking == "http://m"
