"""What a driver keeps for itself when it connects to Ray, and what it tells where it cannot."""

import logging
import os
import socket
import subprocess
import sys
import time

import pytest
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoReply
from ray.exceptions import AuthenticationError

from corun_ray.service.cluster import connect, ports
from corun_ray.service.cluster.connect import ClusterError
from corun_ray.service.errors import JobFailed
from tests.conftest import free_port

DRIVER = """
import signal, time
from corun_ray.service.cluster.connect import connect
signal.signal(signal.SIGTERM, signal.default_int_handler)
connect()
try:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(1)
except KeyboardInterrupt:
    time.sleep(4)
    print("closed")
"""


def test_a_driver_that_is_terminated_has_the_time_to_close_what_it_opened():
    environment = os.environ | {"RAY_ADDRESS": ""}
    driver = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, env=environment)
    assert (driver.returncode, driver.stdout) == (0, "closed\n"), driver.stderr


def refused(address: str) -> str:
    with pytest.raises(ClusterError) as caught:
        connect._join_cluster(address, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_cluster_that_ray_looks_for_is_asked_as_well(monkeypatch):
    def find(address: str, folder: str | None) -> str:
        return f"127.0.0.1:{free_port()}"

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(connect.services, "get_ray_address_from_environment", find)
    assert "nobody listens there" in refused("auto")

    def find_none(address: str, folder: str | None) -> str:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")

    monkeypatch.setattr(connect.services, "get_ray_address_from_environment", find_none)
    assert "(Could not find any running Ray instance. Please specify the one to connect to)" in refused("auto")


def test_a_machine_that_is_no_node_is_told_before_ray_waits(monkeypatch):
    monkeypatch.setattr(connect, "ask_for_ray", lambda address: None)
    monkeypatch.setattr(connect.services, "find_node_ids", list)
    assert "this machine is no node of it" in refused("10.0.0.1:6379")


def test_a_node_here_that_hangs_or_is_of_another_cluster_is_told(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        node = GcsNodeInfo(node_id=b"\1", node_manager_address="127.0.0.1", node_manager_port=mute.getsockname()[1])
        nodes = GetAllNodeInfoReply(node_info_list=[node]).SerializeToString()
        monkeypatch.setattr(ports, "ANSWER_TIMEOUT_S", 0.2)
        monkeypatch.setattr(connect, "ask_for_ray", lambda address: None)
        monkeypatch.setattr(connect, "fetch_nodes", lambda address: nodes)
        monkeypatch.setattr(connect.services, "find_node_ids", lambda: ["01"])
        assert "its node on this machine does not" in refused("10.0.0.1:6379")
        monkeypatch.setattr(connect.services, "find_node_ids", lambda: ["02"])
        assert "this machine is no node of it" in refused("10.0.0.1:6379")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n"), "Ray: 2.60.0; both sides"),
        (AuthenticationError("no token"), "the cluster wants its token"),
        (None, "does not let this process join"),
    ],
)
def test_why_a_cluster_cannot_be_joined_is_told_whole(monkeypatch, error, said):
    def init(**options: object) -> None:
        if error is not None:
            raise error
        time.sleep(10)

    monkeypatch.setattr(connect, "ask_for_ray", lambda address: None)
    monkeypatch.setattr(connect, "fetch_nodes", lambda address: b"")
    monkeypatch.setattr(connect.services, "find_node_ids", lambda: ["node"])
    monkeypatch.setattr(connect, "JOIN_LIMIT_S", 0.2)
    monkeypatch.setattr(connect.ray, "init", init)
    assert said in refused("10.0.0.1:6379")


def test_a_local_ray_that_does_not_start_is_a_line(monkeypatch):
    def init(**options: object) -> None:
        raise RuntimeError("The current node timed out during startup.\nThe GCS may be overloaded.")

    monkeypatch.setattr(connect.ray, "init", init)
    with pytest.raises(JobFailed) as caught:
        connect._start_local_ray(1, {})
    assert "timed out during startup. The GCS may be overloaded" in str(caught.value)
    assert "RAY_TMPDIR" in str(caught.value) and "\n" not in str(caught.value)


def test_ray_data_stays_quiet_where_it_is_imported_after_ray_has_started(local_ray):
    """It sets its own level when it is imported: a pipeline's evaluation comes after trainings."""
    logger = logging.getLogger("ray.data")
    logger.setLevel(logging.DEBUG)
    connect.connect()
    assert logger.level == logging.CRITICAL
