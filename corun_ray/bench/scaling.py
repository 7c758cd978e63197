"""Times gloo's all-reduce, and a backward pass with and without it, between processes of this machine.

What many GPUs would make of a step, by the formulae of `scaling`, and how well these hold on this machine."""

import json
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from corun_ray.bench.scaling_model import (
    MIB,
    Link,
    ManyWorkersStep,
    PoolModel,
    Topology,
    WorkerStep,
    bucket_sizes,
    exposed_s,
    fitted_link,
    label_bytes,
    ready_times_s,
    scaled,
)
from corun_ray.core.choices import Encoding
from corun_ray.core.networks.corun import CORUN

FIT_BYTES = (4 * 1024, 256 * 1024, 2 * MIB, 16 * MIB)
"""Sizes whose times a link is fitted to; 4 kB are all latency."""
CHECK_BYTES = (64 * 1024, MIB, 8 * MIB)
"""Further ones that the fit has to predict, beside the buckets."""
WARM_UP = 2


@dataclass(frozen=True)
class RingReport:
    """All-reduces of so many processes, a thread each."""

    processes: int
    times_s: dict[int, float]
    """Medians by bytes."""
    link: Link
    """Fitted to `FIT_BYTES` alone."""

    def formula_s(self, num_bytes: int) -> float:
        """What a ring of such links takes."""
        return Topology(self.processes, self.processes, self.link, self.link).ring_s(num_bytes)


@dataclass(frozen=True)
class BackwardReport:
    """The backward pass of so many processes, a thread each, medians."""

    processes: int
    alone_s: float
    """Without any communication."""
    together_s: float
    buckets: list[int]
    """DDP's own, in bytes."""

    def bounds_s(self, ring: RingReport) -> tuple[float, float]:
        """The pass by formula, on links as in `ring`: buckets hidden as far as can be, and none of them hidden."""
        outlasts_s = exposed_s(self.buckets, ready_times_s(self.buckets, self.alone_s), ring.formula_s)
        return self.alone_s + outlasts_s, self.alone_s + sum(map(ring.formula_s, self.buckets))


def bench_rings(processes: int, buckets: Sequence[int], repeats: int) -> RingReport:
    """Measures `FIT_BYTES`, `CHECK_BYTES` and the buckets."""
    sizes = sorted({*FIT_BYTES, *CHECK_BYTES, *buckets})
    times_s = dict(zip(sizes, _in_processes(_time_rings, processes, sizes, repeats), strict=True))
    return RingReport(processes, times_s, fitted_link(processes, {size: times_s[size] for size in FIT_BYTES}))


def bench_backward(processes: int, stages: int, width: int, size_px: int, repeats: int) -> BackwardReport:
    """CORUN on one image of `size_px` a process, in DDP as the service sets it up; both ways by turns."""
    alone_s, together_s, *buckets = _in_processes(_time_backward, processes, stages, width, size_px, repeats)
    return BackwardReport(processes, alone_s, together_s, [int(size) for size in buckets])


def _in_processes(measure: Callable[..., list[float]], processes: int, *arguments: object) -> list[float]:
    """What rank 0 of a group of new processes returns."""
    with tempfile.TemporaryDirectory(prefix="corun-bench-") as name:
        torch.multiprocessing.spawn(_rank, (processes, name, measure, arguments), processes)
        return json.loads(Path(name, "result.json").read_text())


def _rank(rank: int, processes: int, folder: str, measure: Callable[..., list[float]], arguments: Sequence) -> None:
    torch.set_num_threads(1)
    # Of weights with one input channel, whose layouts are the same whatever their strides say.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # The group is of this machine alone, whose own name may stand for an address that nobody answers at.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        result = measure(*arguments)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _time_rings(sizes: Sequence[int], repeats: int) -> list[float]:
    """Median seconds of an all-reduce of each size in bytes; sizes take turns."""
    tensors = [torch.zeros(size // 4) for size in sizes]
    rounds = [[_seconds(partial(dist.all_reduce, tensor)) for tensor in tensors] for _ in range(WARM_UP + repeats)]
    return [statistics.median(times_s) for times_s in zip(*rounds[WARM_UP:], strict=True)]


def _time_backward(stages: int, width: int, size_px: int, repeats: int) -> list[float]:
    """Median seconds of a backward pass alone and with gradients averaged; then the sizes of DDP's buckets."""
    torch.manual_seed(0)
    student = nn.parallel.DistributedDataParallel(CORUN(stages, width), gradient_as_bucket_view=True)
    image = torch.rand(1, 3, size_px, size_px)
    alone_s, together_s = [], []
    for _ in range(WARM_UP + repeats):
        with student.no_sync():
            alone_s.append(_backward_s(student, image))
        together_s.append(_backward_s(student, image))
    buckets = student._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    sizes = [float(size) for size in buckets.split(",")]
    return [statistics.median(alone_s[WARM_UP:]), statistics.median(together_s[WARM_UP:]), *sizes]


def _backward_s(student: nn.Module, image: torch.Tensor) -> float:
    scene, transmission = student(image)
    loss = scene.mean() + transmission.mean()
    student.zero_grad(set_to_none=True)
    return _seconds(loss.backward)


def _seconds(run: Callable[[], object]) -> float:
    """Of one call, which all processes begin together."""
    dist.barrier()
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


BACKWARD_SHARE, BEFORE_LABELS_SHARE, RATING_SHARE = 0.4, 0.2, 0.9
"""Of a step whose candidates lose, where only its time is given; measured on a CPU: docs/performance.md, Out to many
GPUs."""
BYTES_PER_GBIT = 1e9 / 8
SMALL_PX = 32


@dataclass(frozen=True)
class ScalingSettings:
    """What is asked for; link speeds are those of one direction."""

    gpus: Sequence[int] = (8, 64, 512)
    gpus_per_node: int = 8
    link_gbit: Sequence[float] = (25, 100, 200)
    """Between nodes, of all cards of a node together; a table each."""
    link_latency_us: float = 14
    node_gbit: float = 1880
    """Between the GPUs of a node."""
    node_latency_us: float = 4
    method: str = "colabator"
    stages: int = 4
    width: int = 30
    size_px: int = 288
    encoding: Encoding = "uint8"
    shards: int = 1
    win_rate: float = 0.1
    share_blocks: bool = False
    samples_per_s: float = 36
    """That a core makes for the stream."""
    processes: Sequence[int] = (2, 4)
    """For the check; the first number also for the backward pass."""
    check_size_px: int = 96
    repeats: int = 10

    def layout(self, gpus: int, link_gbit: float) -> Topology:
        """Of so many GPUs."""
        inside = Link(self.node_latency_us / 1e6, self.node_gbit * BYTES_PER_GBIT)
        between = Link(self.link_latency_us / 1e6, link_gbit * BYTES_PER_GBIT)
        return Topology(gpus, self.gpus_per_node, inside, between)

    def pool(self) -> PoolModel | None:
        """None in pre-training."""
        if self.method == "pretrain":
            return None
        return PoolModel(label_bytes(self.size_px, self.encoding), self.shards, self.win_rate, self.share_blocks)


@dataclass(frozen=True)
class ScalingReport:
    """What was worked out and measured."""

    settings: ScalingSettings
    alone: WorkerStep
    buckets: list[int]
    """Bytes, in the order in which they go."""
    by_link: list[list[ManyWorkersStep]]
    """For each link, for each number of GPUs."""
    rings: list[RingReport]
    backward: BackwardReport | None


def bench_scaling(settings: ScalingSettings, alone: WorkerStep, check: bool = True) -> ScalingReport:
    """Works it out for every link; with `check`, also measures on this machine."""
    buckets = bucket_sizes(gradient_bytes(CORUN(settings.stages, settings.width)))
    by_link = [
        [scaled(alone, settings.pool(), settings.layout(gpus, link), buckets) for gpus in settings.gpus]
        for link in settings.link_gbit
    ]
    if not check:
        return ScalingReport(settings, alone, buckets, by_link, [], None)
    rings = [bench_rings(processes, buckets, settings.repeats) for processes in settings.processes]
    network = settings.stages, settings.width, settings.check_size_px
    backward = bench_backward(settings.processes[0], *network, settings.repeats)
    return ScalingReport(settings, alone, buckets, by_link, rings, backward)


def gradient_bytes(network: CORUN) -> list[int]:
    """Of its parameters, in the order in which a backward pass finishes them."""
    sizes: list[int] = []
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: sizes.append(p.numel() * p.element_size()))
    scene, transmission = network(torch.rand(1, 3, SMALL_PX, SMALL_PX))
    (scene.mean() + transmission.mean()).backward()
    return sizes


def assumed_step(step_s: float, images: int, rating_s: float | None = None) -> WorkerStep:
    """A step of which only its time is known, and perhaps that of rating an image's blocks."""
    rating_s = RATING_SHARE * step_s / images if rating_s is None else rating_s
    return WorkerStep(step_s, BACKWARD_SHARE * step_s, BEFORE_LABELS_SHARE * step_s, rating_s, images)


def measured_step(report: dict[str, Any], rating_s: float | None = None) -> WorkerStep:
    """The step of a report that `bench step --json` wrote.

    Raises `ValueError` where none or most of its candidates won, which leaves one of both ways unmeasured.
    """
    try:
        settings, parts = report["settings"], report["parts_s"]
        images, win_rate = settings["batch"], settings["win_rate"]
        if settings["method"] == "pretrain":
            return WorkerStep(report["step_s"], parts["backward"], 0.0, 0.0, images)
        if not 0 < win_rate * images < 0.5 and rating_s is None:
            raise ValueError("a win in some steps and in fewer than half of them was expected; or give --rating-s")
        rating_s = parts["local scores"] / (win_rate * images) if rating_s is None else rating_s
        return WorkerStep(
            report["step_s"], parts["backward"], parts["teacher"] + parts["global scores"], rating_s, images
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not what bench step --json writes (no {error})") from None
