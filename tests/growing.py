"""A Ray cluster that adds nodes by itself: Ray's own autoscaler, with Ray's provider of make-believe machines.

`ray.cluster_utils.AutoscalingCluster` does the same, but ends every Ray of the machine first.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from ray._private.services import get_node_ip_address
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from corun_ray.service.cluster.autoscaling import MONITORS, STATUS_KEY
from corun_ray.service.cluster.ports import is_answering
from tests.conftest import free_port

START_TIMEOUT_S = 90.0
HEAD_TYPE = "ray.head.default"
NOTHING = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
"""Kinds of commands that a configuration must have, and these machines do not need."""


class GrowingCluster:
    """A head without CPUs, and nodes of some types that come as they are asked for; a context manager."""

    def __init__(self, node_types: Mapping[str, dict], is_v2: bool = False, idle_s: float = 20.0) -> None:
        """`node_types` are those of an autoscaler's configuration, whose head is added; `idle_s` ends an idle node."""
        self.folder = Path(tempfile.mkdtemp(prefix="grow", dir="/tmp"))  # Ray's socket paths must be short
        self._port = free_port()
        self.address = f"{get_node_ip_address()}:{self._port}"
        self._is_v2 = is_v2
        head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        provider = {
            # By its name, `fake_multinode`, Ray wants an example of a configuration that its package lacks.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": self.address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        }
        if is_v2:
            provider |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
        self.config = {
            "cluster_name": "growing",
            "max_workers": 4,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": idle_s / 60,
            "provider": provider,
            "auth": {},
            "docker": {},
            "available_node_types": {**node_types, HEAD_TYPE: head},
            "head_node_type": HEAD_TYPE,
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{kind}_commands": [] for kind in NOTHING},
        }

    def __enter__(self) -> "GrowingCluster":
        config = self.folder / "autoscaler.json"
        config.write_text(json.dumps(self.config))
        # Every port is a free one: other Rays may run on this machine.
        ports = {name: free_port() for name in ("ray-client-server", "dashboard-agent-listen", "metrics-export")}
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--port={self._port}", "--num-cpus=0", f"--temp-dir={self.folder}"),
            *("--include-dashboard=false", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--{name}-port={port}" for name, port in ports.items()),
            f"--autoscaling-config={config}",
        ]
        with (self.folder / "start.log").open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment())
        # The head must answer, and its autoscaler have told of itself.
        deadline_s = time.monotonic() + START_TIMEOUT_S
        try:
            while not self._is_up():
                assert self._process.poll() is None and time.monotonic() < deadline_s, self.log()
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # The nodes are children of the autoscaler, which is one of the head.
        below = psutil.Process(self._process.pid).children(recursive=True)
        for process in [psutil.Process(self._process.pid), *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def hold_autoscaler(self) -> None:
        """Stops the autoscaler for a while: no node comes or goes."""
        self._find_autoscaler()[0].suspend()

    def release_autoscaler(self) -> None:
        """Lets the autoscaler go on."""
        self._find_autoscaler()[0].resume()

    def count_nodes(self) -> int:
        """The living nodes, with the head."""
        return sum(node.state == GcsNodeInfo.GcsNodeState.ALIVE for node in self._gcs().get_all_node_info().values())

    def _is_up(self) -> bool:
        """Whether the head answers, and its autoscaler has told of itself; the second one does from the start."""
        if not is_answering(get_node_ip_address(), self._port) or not self._find_autoscaler():
            return False
        return self._is_v2 or bool(self._gcs().internal_kv_get(STATUS_KEY.encode(), None))

    def _find_autoscaler(self) -> list[psutil.Process]:
        """The process of the autoscaler, if it runs."""
        below = psutil.Process(self._process.pid).children(recursive=True)
        return [process for process in below if any(part.endswith(MONITORS) for part in process.cmdline())]

    def _gcs(self) -> GcsClient:
        return GcsClient(self.address)

    def log(self) -> str:
        """What `ray start` has printed."""
        return (self.folder / "start.log").read_text(errors="replace")[-3000:]

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        # As launchers of clusters do it, the head's type is told.
        environment |= {
            "RAY_NODE_TYPE_NAME": HEAD_TYPE,
            "AUTOSCALER_METRIC_PORT": str(free_port()),
            "RAY_AUTH_MODE": "disabled",
        }
        if self._is_v2:
            environment |= {
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            }
        return environment
