"""The doctor's look at the nodes of a cluster: what each has, what each reaches, and how they talk."""

import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.actor import ActorProxy
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from corun_ray.config.jobs import ClusterSection
from corun_ray.service.cluster.connect import format_nodes
from corun_ray.service.cluster.gpus import count_driver_gpus
from corun_ray.service.doctor.places import StorageSpeed, shorten_patience, try_storage
from corun_ray.service.errors import find_root_cause
from corun_ray.service.storage import Location, StorageError
from corun_ray.service.train.launch import describe_failure, make_scaling_config
from corun_ray.service.train.process_group import NodeTorchConfig
from corun_ray.service.train.trainer import StoppableTrainer

ANSWER_TIMEOUT_S = 60.0
CLOCK_QUESTIONS = 5
"""How often a node is asked for its time; the fastest answer counts."""
ALL_REDUCE_REPEATS = 3
MIB = 2**20
BYTES_PER_FLOAT = 4

Answer = TypeVar("Answer")


class NodeTrouble(Exception):
    """A node that does not answer; the message is one line."""


# --- Facts, storage and clocks of every node ---


@dataclass(frozen=True)
class MachineFacts:
    """Versions and GPUs of a machine."""

    python: str
    torch: str
    ray: str
    cuda: str | None
    torch_gpus: int
    """GPUs that torch can use."""
    driver_gpus: int
    """GPUs that the NVIDIA driver lists."""


def collect_local_facts() -> MachineFacts:
    """Collect the facts of this machine."""
    return MachineFacts(
        python=platform.python_version(),
        torch=torch.__version__,
        ray=ray.__version__,
        cuda=torch.version.cuda,
        torch_gpus=torch.cuda.device_count(),
        driver_gpus=count_driver_gpus(),
    )


class NodeProbe:
    """Actor on a node that answers the doctor; it needs no CPU."""

    @ray.method
    def collect_facts(self) -> MachineFacts:
        """Collect the facts of this node."""
        return collect_local_facts()

    @ray.method
    def read_clock(self) -> float:
        """Return this node's time in seconds since 1970."""
        return time.time()

    @ray.method
    def try_storage(self, place: Location, marker: str, content: bytes) -> StorageSpeed | str:
        """Try storage from this node.

        It must also see the file `marker` that another machine wrote.

        A storage error is returned as its text: Ray would wrap one that is raised in others.
        """
        shorten_patience()
        try:
            if not place.child(marker).exists() or place.child(marker).read() != content:
                return f"cannot use {place.uri}: what another machine writes there does not show"
            return try_storage(place)
        except StorageError as error:
            return str(error)


class ClusterNodes:
    """The living nodes of the connected cluster, by address, with a probe on each."""

    def __init__(self) -> None:
        self._nodes = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}

        self._probes: dict[str, ActorProxy[NodeProbe]] = {}
        for address, node in self._nodes.items():
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe = ray.remote(NodeProbe).options(num_cpus=0, scheduling_strategy=on_node).remote()
            self._probes[address] = probe

        self._facts: dict[str, MachineFacts] = {}

    def collect_facts(self) -> dict[str, MachineFacts]:
        """Return the facts of each node; raises `NodeTrouble`."""
        if not self._facts:
            self._facts = self._ask_all(lambda probe: probe.collect_facts.remote())
        return self._facts

    def describe_other_versions(self) -> str:
        """Describe the nodes with other versions than ours.

        Compares Python, torch and Ray. The text is empty where there is no such node.
        """
        here = collect_local_facts()
        others = []
        for address, facts in self.collect_facts().items():
            if (facts.python, facts.torch, facts.ray) != (here.python, here.torch, here.ray):
                others.append(f"{address} (Python {facts.python}, torch {facts.torch}, Ray {facts.ray})")
        return "; ".join(others)

    def count_ray_gpus(self) -> dict[str, float]:
        """Return the GPUs that Ray counts on each node."""
        return {address: node["Resources"].get("GPU", 0.0) for address, node in self._nodes.items()}

    def summarise(self) -> str:
        """Return the number of nodes and their resources as text."""
        cpus = sum(node["Resources"].get("CPU", 0.0) for node in self._nodes.values())
        gpus = sum(self.count_ray_gpus().values())
        return f"{format_nodes(len(self._nodes))}, {cpus:g} CPUs, {gpus:g} GPUs"

    def measure_clocks(self) -> dict[str, float]:
        """Measure how far each node's clock is ahead, in seconds; raises `NodeTrouble`."""
        return {address: _measure_clock(address, probe) for address, probe in self._probes.items()}

    def try_storage(self, place: Location) -> list[StorageSpeed]:
        """Try storage from each node.

        Each must also see a file that is written from here.

        Raises `StorageError`, naming the node.
        """
        # Write a file here, and let each node look for it.
        marker, content = f".corun-doctor-{os.urandom(6).hex()}", os.urandom(16)
        place.child(marker).write(content)
        try:
            answers = self._ask_all(lambda probe: probe.try_storage.remote(place, marker, content))
        finally:
            place.child(marker).delete()

        speeds = []
        for address, answer in answers.items():
            if isinstance(answer, str):
                raise StorageError(f"from {address}: {answer}")

            speeds.append(answer)

        return speeds

    def _ask_all(self, ask: "Callable[[ActorProxy[NodeProbe]], ray.ObjectRef[Answer]]") -> dict[str, Answer]:
        """Ask all nodes at once; return their answers.

        Raises `NodeTrouble`.
        """
        pending = {address: ask(probe) for address, probe in self._probes.items()}
        return {address: _await_answer(address, answer) for address, answer in pending.items()}


def _await_answer(address: str, answer: "ray.ObjectRef[Answer]") -> Answer:
    """Wait for a node's answer; raises `NodeTrouble`."""
    try:
        return ray.get(answer, timeout=ANSWER_TIMEOUT_S)
    except RayError as error:
        raise NodeTrouble(f"{address} does not answer: {find_root_cause(str(error))}") from None


def _measure_clock(address: str, probe: ActorProxy[NodeProbe]) -> float:
    """Measure how far a node's clock is ahead, in seconds; raises `NodeTrouble`."""
    # The node read its clock about halfway between question and answer.
    measured = []
    for _ in range(CLOCK_QUESTIONS):
        asked_s = time.time()
        node_s = _await_answer(address, probe.read_clock.remote())
        answered_s = time.time()
        measured.append((answered_s - asked_s, node_s - (asked_s + answered_s) / 2))

    # The fastest answer is the most exact.
    _, offset_s = min(measured)
    return offset_s


# --- A sum over the training workers ---


@dataclass(frozen=True)
class _SumResult:
    """Number of workers and nodes that took part in a sum, and its least time."""

    workers: int
    nodes: int = 1
    backend: str = "none"
    seconds: float = 0.0


def measure_all_reduce(size: ClusterSection, mib: int) -> str:
    """Measure how fast workers sum `mib` MiB, as text.

    They are the job's workers, and sum as they sum their gradients.

    Raises `RuntimeError`, in one line, where they cannot.
    """
    # A training without steps; a failed worker is not started again.
    with tempfile.TemporaryDirectory() as folder:
        trainer = StoppableTrainer(
            functools.partial(_sum_on_worker, mib),  # type: ignore[arg-type]
            scaling_config=make_scaling_config(size),
            torch_config=NodeTorchConfig(timeout_s=int(ANSWER_TIMEOUT_S)),  # type: ignore[arg-type]
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            # Ray's annotations are those of its older trainer, whose results had no return value.
            result: _SumResult = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise RuntimeError("; ".join(describe_failure(error))) from None

    if result.workers == 1:
        return "a single worker: nothing to sum"

    # Each byte crosses the slowest link 2 (n - 1) / n times, as NCCL's own tests count.
    num_bytes = 2 * (result.workers - 1) / result.workers * mib * MIB
    gb_per_s = num_bytes / result.seconds / 1e9
    where = f"{result.workers} workers on {format_nodes(result.nodes)}"
    return f"{where}: {mib} MiB summed by {result.backend} in {1000 * result.seconds:.0f} ms, {gb_per_s:.2f} GB/s"


def _sum_on_worker(mib: int) -> _SumResult:
    """Take part in a sum of `mib` MiB; check the sum."""
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    workers, rank = context.get_world_size(), context.get_world_rank()
    if workers == 1:
        return _SumResult(workers)

    seconds = []

    # One more, since the first sum also connects the workers.
    for _ in range(1 + ALL_REDUCE_REPEATS):
        # Time one sum, from the moment at which all workers are ready.
        numbers = torch.full((mib * MIB // BYTES_PER_FLOAT,), float(rank + 1), device=device)
        dist.barrier()
        started_s = time.monotonic()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize()

        seconds.append(time.monotonic() - started_s)

        # The sum of 1 to n.
        if not bool((numbers == workers * (workers + 1) / 2).all()):
            raise RuntimeError(f"rank {rank} got a wrong sum")

    # Count the nodes that took part.
    nodes: list[str] = [""] * workers
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return _SumResult(workers, len(set(nodes)), dist.get_backend(), min(seconds[1:]))
