"""Forecast a training step on many GPUs, and check the formulae of the forecast on this machine.

The check times gloo's all-reduce between processes of this machine, and a backward pass with and without it.
"""

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
    BYTES_PER_GBIT,
    MIB,
    Link,
    ManyWorkersStep,
    PoolModel,
    Topology,
    WorkerStep,
    count_label_bytes,
    fit_link,
    predict_exposed_s,
    predict_ready_times_s,
    predict_step,
    split_into_buckets,
)
from corun_ray.core.choices import Encoding
from corun_ray.core.networks.corun import CORUN

BACKWARD_SHARE = 0.4
BEFORE_LABELS_SHARE = 0.2
RATING_SHARE = 0.9
"""Parts of a step whose candidates lose, as shares of its time, where only this time is given.

Measured on a CPU: docs/performance.md, Out to many GPUs.
"""
FIT_BYTES = (4 * 1024, 256 * 1024, 2 * MIB, 16 * MIB)
"""Sizes of the all-reduces that a link is fitted to; the time of 4 kB is all latency."""
CHECK_BYTES = (64 * 1024, MIB, 8 * MIB)
"""Further sizes, which the fit has to predict, as it has to predict the buckets."""
WARM_UP_CALLS = 2
SMALL_PX = 32
"""Side of the image that finds the order of gradients; the order does not depend on it."""


# --- Settings and results ---


@dataclass(frozen=True)
class ScalingSettings:
    """The cluster, the job and the check; link speeds are those of one direction."""

    gpus: Sequence[int] = (8, 64, 512)
    gpus_per_node: int = 8
    link_gbit: Sequence[float] = (25, 100, 200)
    """Between nodes, of all network cards of a node together; the forecast has a table for each."""
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
    """Samples per second that one core makes for the stream."""
    processes: Sequence[int] = (2, 4)
    """Processes of the all-reduce check; the backward pass is checked with the first number."""
    check_size_px: int = 96
    repeats: int = 10

    def build_topology(self, gpus: int, link_gbit: float) -> Topology:
        """Return the topology of a number of GPUs.

        `link_gbit` is the bandwidth between nodes.
        """
        inside = Link(self.node_latency_us / 1e6, self.node_gbit * BYTES_PER_GBIT)
        between = Link(self.link_latency_us / 1e6, link_gbit * BYTES_PER_GBIT)
        return Topology(gpus, self.gpus_per_node, inside, between)

    def build_pool(self) -> PoolModel | None:
        """Return the model of the label pool; None in pre-training."""
        if self.method == "pretrain":
            return None
        label_bytes = count_label_bytes(self.size_px, self.encoding)
        return PoolModel(label_bytes, self.shards, self.win_rate, self.share_blocks)


@dataclass(frozen=True)
class RingReport:
    """Measured all-reduces between processes, one thread each."""

    processes: int
    times_s: dict[int, float]
    """Number of bytes → median seconds."""
    link: Link
    """Fitted to the times of `FIT_BYTES` alone."""

    def predict_s(self, num_bytes: int) -> float:
        """Predict the seconds of a ring of such links."""
        return Topology(self.processes, self.processes, self.link, self.link).predict_ring_s(num_bytes)


@dataclass(frozen=True)
class BackwardReport:
    """Median backward passes of several processes, one thread each."""

    processes: int
    alone_s: float
    """Without communication."""
    together_s: float
    """With gradients averaged between the processes."""
    buckets: list[int]
    """Bytes of the buckets that DDP itself reports."""

    def predict_bounds_s(self, ring: RingReport) -> tuple[float, float]:
        """Predict bounds of the pass on links as in `ring`.

        The first hides as much of the communication as possible, the second none.
        """
        ready_s = predict_ready_times_s(self.buckets, self.alone_s)
        exposed_s = predict_exposed_s(self.buckets, ready_s, ring.predict_s)
        return self.alone_s + exposed_s, self.alone_s + sum(map(ring.predict_s, self.buckets))


@dataclass(frozen=True)
class ScalingReport:
    """The forecast and the results of the check."""

    settings: ScalingSettings
    alone: WorkerStep
    buckets: list[int]
    """Bytes of DDP's buckets, in the order in which they are sent."""
    by_link: list[list[ManyWorkersStep]]
    """A list for each link, with a step for each number of GPUs."""
    rings: list[RingReport]
    """A report for each number of processes; empty without the check."""
    backward: BackwardReport | None
    """None without the check."""


# --- The step of one worker ---


def assume_step(step_s: float, images: int, rating_s: float | None = None) -> WorkerStep:
    """Return a step when only its time is known.

    The time of rating an image's blocks, `rating_s`, may be known too.
    """
    if rating_s is None:
        rating_s = RATING_SHARE * step_s / images
    return WorkerStep(step_s, BACKWARD_SHARE * step_s, BEFORE_LABELS_SHARE * step_s, rating_s, images)


def read_measured_step(report: dict[str, Any], rating_s: float | None = None) -> WorkerStep:
    """Return the step of a report that `bench step --json` wrote.

    Raises `ValueError` where no step or most steps had a winner, so that one kind of step was not measured. A given
    `rating_s` stands in for the measurement.
    """
    try:
        settings = report["settings"]
        parts_s = report["parts_s"]
        step_s = report["step_s"]
        images = settings["batch"]
        win_rate = settings["win_rate"]
        if settings["method"] == "pretrain":
            return WorkerStep(step_s, parts_s["backward"], 0.0, 0.0, images)

        # The median step has no winner only if fewer than half of the steps have one. The mean time of local scores
        # is that of the winners' share.
        if rating_s is None:
            if not 0 < win_rate * images < 0.5:
                raise ValueError("expected wins in some steps, but in fewer than half of them; or give --rating-s")
            rating_s = parts_s["local scores"] / (win_rate * images)

        before_labels_s = parts_s["teacher"] + parts_s["global scores"]
        return WorkerStep(step_s, parts_s["backward"], before_labels_s, rating_s, images)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a report of bench step --json (no {error})") from None


# --- The forecast ---


def bench_scaling(settings: ScalingSettings, alone: WorkerStep, check: bool = True) -> ScalingReport:
    """Forecast the step for every link and number of GPUs.

    With `check`, also measure on this machine.
    """
    # The forecast.
    buckets = split_into_buckets(list_gradient_bytes(CORUN(settings.stages, settings.width)))
    pool = settings.build_pool()
    by_link = []
    for link_gbit in settings.link_gbit:
        topologies = [settings.build_topology(gpus, link_gbit) for gpus in settings.gpus]
        by_link.append([predict_step(alone, pool, topology, buckets) for topology in topologies])
    if not check:
        return ScalingReport(settings, alone, buckets, by_link, [], None)

    # The check.
    rings = [bench_rings(processes, buckets, settings.repeats) for processes in settings.processes]
    backward = bench_backward(
        settings.processes[0], settings.stages, settings.width, settings.check_size_px, settings.repeats
    )
    return ScalingReport(settings, alone, buckets, by_link, rings, backward)


def list_gradient_bytes(network: CORUN) -> list[int]:
    """Return the bytes of the network's gradients.

    Their order is that in which a backward pass finishes them.
    """
    # Note each gradient as soon as it is complete.
    sizes: list[int] = []
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: sizes.append(p.numel() * p.element_size()))

    # One backward pass of both outputs.
    scene, transmission = network(torch.rand(1, 3, SMALL_PX, SMALL_PX))
    (scene.mean() + transmission.mean()).backward()
    return sizes


# --- The check: processes of this machine ---


def bench_rings(processes: int, buckets: Sequence[int], repeats: int) -> RingReport:
    """Measure all-reduces between processes of this machine.

    The sizes are `FIT_BYTES`, `CHECK_BYTES` and the buckets. A link is fitted to `FIT_BYTES`.
    """
    sizes = sorted({*FIT_BYTES, *CHECK_BYTES, *buckets})
    medians_s = _run_in_processes(_time_rings, processes, sizes, repeats)
    times_s = dict(zip(sizes, medians_s, strict=True))

    # The link is fitted to some of the sizes, so that the others can check it.
    fit_times_s = {size: times_s[size] for size in FIT_BYTES}
    link = fit_link(processes, fit_times_s)
    return RingReport(processes, times_s, link)


def bench_backward(processes: int, stages: int, width: int, size_px: int, repeats: int) -> BackwardReport:
    """Measure CORUN's backward pass with and without communication.

    DDP is set up as in the service.

    Each process has one image of `size_px`. Both kinds of passes take turns.
    """
    alone_s, together_s, *buckets = _run_in_processes(_time_backward, processes, stages, width, size_px, repeats)
    return BackwardReport(processes, alone_s, together_s, [*map(int, buckets)])


def _run_in_processes(measure: Callable[..., list[float]], processes: int, *arguments: object) -> list[float]:
    """Run `measure` in new processes; return rank 0's result.

    The processes form a gloo group.
    """
    with tempfile.TemporaryDirectory(prefix="corun-bench-") as name:
        torch.multiprocessing.spawn(_run_rank, (processes, name, measure, arguments), processes)
        return json.loads(Path(name, "result.json").read_text())


def _run_rank(rank: int, processes: int, folder: str, measure: Callable[..., list[float]], arguments: Sequence) -> None:
    """Run `measure` as one rank of the group.

    Rank 0 writes the result to the folder.
    """
    torch.set_num_threads(1)

    # DDP warns of weights with one input channel; their layouts are the same whatever their strides say.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")

    # Use the loopback interface: this machine's own name may stand for an address that nobody answers at.
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)

    # Measure. No rank leaves the group before all are done.
    try:
        result = measure(*arguments)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _time_rings(sizes: Sequence[int], repeats: int) -> list[float]:
    """Return the median seconds of an all-reduce by size.

    Sizes are in bytes and take turns.
    """
    # All processes reduce the same sizes in the same order.
    tensors = [torch.zeros(size // 4) for size in sizes]
    rounds_s = []
    for _ in range(WARM_UP_CALLS + repeats):
        rounds_s.append([_time_together(partial(dist.all_reduce, tensor)) for tensor in tensors])

    # Median of each column, the first rounds not counted.
    return [statistics.median(times_s) for times_s in zip(*rounds_s[WARM_UP_CALLS:], strict=True)]


def _time_backward(stages: int, width: int, size_px: int, repeats: int) -> list[float]:
    """Time backward passes with and without gradients averaged.

    Returns the median seconds without and with, then the bytes of DDP's buckets.
    """
    torch.manual_seed(0)
    student = nn.parallel.DistributedDataParallel(CORUN(stages, width), gradient_as_bucket_view=True)
    image = torch.rand(1, 3, size_px, size_px)

    # Both ways by turns, so that other work on the machine disturbs both alike.
    alone_s: list[float] = []
    together_s: list[float] = []
    for _ in range(WARM_UP_CALLS + repeats):
        with student.no_sync():
            alone_s.append(_time_one_backward(student, image))
        together_s.append(_time_one_backward(student, image))

    # DDP reports the bytes of its buckets as text: "1048576,26214400".
    buckets = student._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    bucket_bytes = map(float, buckets.split(","))
    return [statistics.median(alone_s[WARM_UP_CALLS:]), statistics.median(together_s[WARM_UP_CALLS:]), *bucket_bytes]


def _time_one_backward(student: nn.Module, image: torch.Tensor) -> float:
    """Return the seconds of a backward pass alone."""
    # The forward pass, not timed.
    scene, transmission = student(image)
    loss = scene.mean() + transmission.mean()
    student.zero_grad(set_to_none=True)
    return _time_together(loss.backward)


def _time_together(run: Callable[[], object]) -> float:
    """Return the seconds of one call that all processes begin together."""
    dist.barrier()
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s
