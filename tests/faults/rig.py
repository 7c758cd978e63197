"""A real cluster of three Ray nodes on this machine, and the `corun-ray` process as its user starts it."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.cluster_utils import Cluster

STEPS = 24
CHECKPOINT_EVERY = 6
RUN_TIMEOUT_S = 240.0
ANSI = re.compile(r"\x1b\[[0-9;]*m")
STEP = re.compile(r"step (\d+)/\d+")


class Rig:
    """The cluster: a head that runs no workers, and nodes that do."""

    def __init__(self, num_nodes: int = 2) -> None:
        self.num_nodes = num_nodes
        self.open()

    def open(self) -> None:
        """Starts the cluster, a new one after `close`."""
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes: list = []
        self.mend()

    def mend(self) -> None:
        """Adds nodes for those that were taken away."""
        self.nodes = [node for node in self.nodes if node in self.cluster.worker_nodes]
        while len(self.nodes) < self.num_nodes:
            self.nodes.append(self.cluster.add_node(num_cpus=3, object_store_memory=200 * 2**20))

    def environment(self, **extra: str) -> dict[str, str]:
        """What the driver needs to find it."""
        return {**os.environ, "RAY_ADDRESS": self.cluster.address, "PYTHONUNBUFFERED": "1", **extra}

    def processes(self, title: str, node=None) -> list[psutil.Process]:
        """Ray's worker processes of this cluster by what they run, on one node or all."""
        return running(title, self._below(node))

    def _below(self, node) -> Iterator[psutil.Process]:
        for one in self.nodes + [self.cluster.head_node] if node is None else [node]:
            for raylet in one.all_processes.get("raylet", ()):
                try:
                    yield from psutil.Process(raylet.process.pid).children(recursive=True)
                except psutil.NoSuchProcess:
                    continue

    def close(self) -> None:
        """Ends every process of the cluster."""
        self.cluster.shutdown()


def running(title: str, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those whose command line has this in it."""
    return [process for process in processes if any(title in part for part in _command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill(process: psutil.Process) -> None:
    """kill -9, of a process that may have gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


class Driver:
    """One `corun-ray run` in a terminal of its own, whose live line says how far it is."""

    def __init__(self, job: Path, environment: dict[str, str], *arguments: str, inside: Sequence[str] = ()) -> None:
        """`inside` is a command that runs the rest of its line somewhere else."""
        master, terminal = pty.openpty()
        command = [*inside, sys.executable, "-m", "corun_ray", "run", str(job), *arguments]
        self._process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment)
        os.close(terminal)
        self.step = 0
        self.output = ""
        self._is_deaf = False
        self._reader = threading.Thread(target=self._read, args=(master,), daemon=True)
        self._reader.start()

    def _read(self, master: int) -> None:
        while not self._is_deaf:
            try:
                data = os.read(master, 65536)
            except OSError:
                break  # the terminal is closed with its last process
            if not data:
                break
            self.output += ANSI.sub("", data.decode(errors="replace"))
            if found := STEP.findall(self.output[-2000:]):
                self.step = int(found[-1])
        os.close(master)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Waits until the condition holds; False if the run ended or took too long before."""
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while self.is_running and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.05)
        return False

    def reaches(self, step: int) -> bool:
        """Waits until so many steps are done; False as of `wait_for`."""
        return self.wait_for(lambda: self.step >= step)

    def says(self, text: str) -> bool:
        """Waits until it has printed this; False as of `wait_for`."""
        return self.wait_for(lambda: text in self.output)

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def stop_reading(self) -> None:
        """Closes the terminal after the next line; what the driver prints then is refused."""
        self._is_deaf = True
        self._reader.join(RUN_TIMEOUT_S)

    def kill(self) -> None:
        """kill -9 of the driver alone."""
        self._process.kill()
        self._process.wait()

    def finish(self) -> int:
        """Waits for the end; returns the exit code."""
        try:
            code = self._process.wait(RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = -9
        self._reader.join(5)
        return code


def write_job(folder: Path, data: Path | str, storage: str, name: str, **sections: dict[str, Any]) -> Path:
    """A small Colabator job: two workers, two shards, a checkpoint every few steps; `sections` are merged over that."""
    tree: dict[str, Any] = {
        "kind": "colabator",
        "name": name,
        "storage": storage,
        "data": {"clear": f"{data}/clear", "depth": f"{data}/depth", "hazy": f"{data}/hazy", "patch_px": 64},
        "network": {"stages": 2, "width": 8},
        "optim": {"ema": 0.5, "lr": 1e-3, "precision": "fp32"},
        "pool": {"shards": 2},
        "train": {
            "steps": STEPS,
            "batch_per_worker": 2,
            "log_every": 4,
            "checkpoint_every": CHECKPOINT_EVERY,
            "validate_every": 1000,
            "validation_images": 1,
            "keep_checkpoints": 2,
        },
        "cluster": {"workers": 2, "max_failures": 3},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    for section, values in sections.items():
        tree[section] |= values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
