"""Jobs on a cluster that has no node for them yet: Ray's own autoscaler adds one, and takes it away again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.growing import GrowingCluster

CPU_WORKER = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 1}
GPU_WORKER = {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1}
"""It says that it has a GPU, and has none: good for all that comes before the work itself."""
TIMEOUT_S = 240.0

WAIT_FOR_GPU = """
import ray
from corun_ray.config.jobs import ClusterSection
from corun_ray.service.cluster.connect import connect
from corun_ray.service.cluster.room import await_room, request_workers

size = ClusterSection(gpus_per_worker=1)
connect(size)
await_room(request_workers(size), lambda line: print(line, flush=True))
print("GPUs:", ray.cluster_resources()["GPU"])
"""


class Command:
    """A program on the cluster, whose lines are read as they come."""

    def __init__(self, cluster: GrowingCluster, folder: Path, *arguments: str) -> None:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
        )
        self.lines: list[str] = []

    def read_until(self, text: str) -> str:
        """Returns the next line that holds this; fails where the program ends before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return line.strip()
        raise AssertionError("\n".join(self.lines))

    def finish(self) -> int:
        """Reads the rest; returns the exit code."""
        rest, _ = self._process.communicate(timeout=TIMEOUT_S)
        self.lines += rest.splitlines()
        return self._process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("is_v2", [False, True], ids=["v1", "v2"])
def test_a_training_waits_for_the_first_node_and_the_node_goes_after_it(dataset, tmp_path, is_v2):
    job = {
        "kind": "pretrain",
        "name": "from-nothing",
        "storage": str(tmp_path / "runs"),
        "data": {"clear": str(dataset / "clear"), "depth": str(dataset / "depth"), "patch_px": 32},
        "network": {"stages": 2, "width": 4},
        "train": {"steps": 2, "batch_per_worker": 1, "checkpoint_every": 2, "validate_every": 100},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))

    with GrowingCluster({"cpu_worker": CPU_WORKER, "gpu_worker": GPU_WORKER}, is_v2) as cluster:
        # What no node type can ever hold is refused at once, and that type is named.
        large = Command(cluster, tmp_path, "-m", "corun_ray", "run", str(path), "--set", "cluster.cpus_per_worker=3")
        line = large.read_until("no room for")
        assert line.endswith(
            "no room for 1 worker of 3 CPUs, and 1 CPU to decode images, ever: the largest node has 0 CPUs; the "
            "autoscaler's largest node type, cpu_worker, has 2 CPUs, at most 1 of it; ask for less (cluster.workers, "
            "cluster.cpus_per_worker, cluster.gpus_per_worker) or add nodes"
        )
        assert large.finish() == 2

        # No node comes before the wait is said; then the run goes to its end.
        cluster.hold_autoscaler()
        run = Command(cluster, tmp_path, "-m", "corun_ray", "run", str(path))
        line = run.read_until("waiting for room")
        assert line.startswith(
            "waiting for room for 1 worker of 1 CPU, and 1 CPU to decode images; the largest node has 0 CPUs; "
            "free now: 0 of 0 CPUs; the autoscaler may add nodes"
        )
        cluster.release_autoscaler()
        run.read_until("there is room, after")
        assert run.finish() == 0, run.lines
        output = "\n".join(run.lines)
        assert f"1 x 1 CPU on {cluster.address} (2 nodes)" in output and "\n  done\n" in output

        # A GPU is asked for while no node has one.
        cluster.hold_autoscaler()
        gpu = Command(cluster, tmp_path, "-c", WAIT_FOR_GPU)
        assert "1 worker of 1 CPU and 1 GPU" in gpu.read_until("waiting for room")
        cluster.release_autoscaler()
        gpu.read_until("GPUs: 1")
        assert gpu.finish() == 0, gpu.lines

        # Nothing of the jobs keeps a node: neither an actor that outlives its job, nor a request.
        deadline_s = time.monotonic() + TIMEOUT_S
        while cluster.count_nodes() > 1 and time.monotonic() < deadline_s:
            time.sleep(0.5)
        assert cluster.count_nodes() == 1
