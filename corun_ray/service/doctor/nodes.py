"""The doctor's look at the nodes of a cluster: what each has, what each reaches, and how they talk."""

import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from corun_ray.config.jobs import ClusterSection
from corun_ray.service.cluster.gpus import count_driver_gpus
from corun_ray.service.doctor.places import StorageSpeed, shorten_patience, try_storage
from corun_ray.service.errors import find_root_cause
from corun_ray.service.storage import Location, StorageError
from corun_ray.service.train.launch import NodeTorchConfig, describe_failure, make_scaling_config

T = TypeVar("T")
ANSWER_S = 60.0
ASKED_FOR_TIME = 5
REPEATS = 3
MIB = 2**20


class NodeTrouble(Exception):
    """A node that does not answer; the message is one line."""


@dataclass(frozen=True)
class MachineFacts:
    """What a machine has."""

    python: str
    torch: str
    ray: str
    cuda: str | None
    torch_gpus: int
    driver_gpus: int


def collect_local_facts() -> MachineFacts:
    """Of the machine that this runs on."""
    return MachineFacts(
        python=platform.python_version(),
        torch=torch.__version__,
        ray=ray.__version__,
        cuda=torch.version.cuda,
        torch_gpus=torch.cuda.device_count(),
        driver_gpus=count_driver_gpus(),
    )


class _Node:
    """An actor on a node, without resources of its own."""

    def facts(self) -> MachineFacts:
        return collect_local_facts()

    def time(self) -> float:
        return time.time()

    def try_storage(self, place: Location, marker: str, content: bytes) -> StorageSpeed | str:
        """A storage error travels as text: Ray would wrap it in others."""
        shorten_patience()
        try:
            if not place.child(marker).exists() or place.child(marker).read() != content:
                return f"cannot use {place.uri}: what another machine writes there does not show"
            return try_storage(place)
        except StorageError as error:
            return str(error)


class ClusterNodes:
    """The nodes of the cluster that is connected, by address."""

    def __init__(self) -> None:
        self._nodes = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}
        actor = ray.remote(num_cpus=0)(_Node)
        self._actors = {
            address: actor.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for address, node in self._nodes.items()
        }
        self._facts: dict[str, MachineFacts] = {}

    def facts(self) -> dict[str, MachineFacts]:
        """What each has. Raises `NodeTrouble`."""
        self._facts = self._facts or self._asked(lambda actor: actor.facts.remote())
        return self._facts

    def with_other_versions(self) -> str:
        """The nodes whose Python, torch or Ray is not that of this process, with what they have; empty for none."""
        here = collect_local_facts()
        others = {
            address: facts
            for address, facts in self.facts().items()
            if (facts.python, facts.torch, facts.ray) != (here.python, here.torch, here.ray)
        }
        return "; ".join(f"{a} (Python {f.python}, torch {f.torch}, Ray {f.ray})" for a, f in others.items())

    def ray_gpus(self) -> dict[str, float]:
        """GPUs by Ray's count."""
        return {address: node["Resources"].get("GPU", 0.0) for address, node in self._nodes.items()}

    def summary(self) -> str:
        """How many nodes and what they have."""
        cpus = sum(node["Resources"].get("CPU", 0.0) for node in self._nodes.values())
        count = len(self._nodes)
        return f"{count} node{'s' * (count != 1)}, {cpus:g} CPUs, {sum(self.ray_gpus().values()):g} GPUs"

    def clocks(self) -> dict[str, float]:
        """Seconds by which the clock of each is ahead of ours, as the fastest of a few questions tells it."""
        return {address: _clock(actor) for address, actor in self._actors.items()}

    def try_storage(self, place: Location) -> list[StorageSpeed]:
        """Tries storage from each, which must also see what is written from here; raises `StorageError`."""
        marker, content = f".corun-doctor-{os.urandom(6).hex()}", os.urandom(16)
        place.child(marker).write(content)
        try:
            outcomes = self._asked(lambda actor: actor.try_storage.remote(place, marker, content))
        finally:
            place.child(marker).delete()
        for address, outcome in outcomes.items():
            if isinstance(outcome, str):
                raise StorageError(f"from {address}: {outcome}")
        return list(outcomes.values())

    def _asked(self, ask: Callable[[Any], Any]) -> dict[str, Any]:
        answers = {address: ask(actor) for address, actor in self._actors.items()}
        return {address: _answer(address, answer) for address, answer in answers.items()}


def _answer(address: str, answer: Any) -> Any:
    try:
        return ray.get(answer, timeout=ANSWER_S)
    except RayError as error:
        raise NodeTrouble(f"{address} does not answer: {find_root_cause(str(error))}") from None


def _clock(actor: Any) -> float:
    tries = []
    for _ in range(ASKED_FOR_TIME):
        asked = time.time()
        told = ray.get(actor.time.remote(), timeout=ANSWER_S)
        answered = time.time()
        tries.append((answered - asked, told - (asked + answered) / 2))
    return min(tries)[1]


def measure_all_reduce(size: ClusterSection, mib: int) -> str:
    """Sums `mib` MiB over the job's workers as their gradients would be; says how fast.

    Raises RuntimeError where they cannot, in one line.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            functools.partial(_all_reduce, mib),  # type: ignore[arg-type]
            scaling_config=make_scaling_config(size),
            torch_config=NodeTorchConfig(timeout_s=int(ANSWER_S)),
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            # Ray's annotations are those of its older trainer, which had no such values.
            summed: _Summed = trainer.fit().return_value  # type: ignore[attr-defined]
        except TrainingFailedError as error:
            raise RuntimeError("; ".join(describe_failure(error))) from None
    if summed.workers == 1:
        return "a single worker: nothing to sum"
    # Each byte crosses the slowest link 2 (n - 1) / n times, as NCCL's own tests count.
    speed = 2 * (summed.workers - 1) / summed.workers * mib * MIB / summed.seconds / 1e9
    where = f"{summed.workers} workers on {summed.nodes} node{'s' * (summed.nodes != 1)}"
    return f"{where}: {mib} MiB summed by {summed.backend} in {1000 * summed.seconds:.0f} ms, {speed:.2f} GB/s"


@dataclass(frozen=True)
class _Summed:
    """What one of the workers saw: how many they were, on how many nodes, and the least time of a sum."""

    workers: int
    nodes: int = 1
    backend: str = "none"
    seconds: float = 0.0


def _all_reduce(mib: int) -> _Summed:
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    workers, rank = context.get_world_size(), context.get_world_rank()
    if workers == 1:
        return _Summed(workers)
    seconds = []
    for _ in range(1 + REPEATS):  # the first one connects
        numbers = torch.full((mib * MIB // 4,), float(rank + 1), device=device)
        dist.barrier()
        started = time.monotonic()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
        if not bool((numbers == workers * (workers + 1) / 2).all()):
            raise RuntimeError(f"rank {rank} got a wrong sum")
    nodes: list[str] = [""] * workers
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return _Summed(workers, len(set(nodes)), dist.get_backend(), min(seconds[1:]))
