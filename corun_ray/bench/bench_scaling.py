"""What many GPUs would make of a step, by the formulae of `scaling`, and how well these hold on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from corun_ray.bench.collectives import Layout, Link, bucket_sizes
from corun_ray.bench.scaling import BackwardReport, RingReport, bench_backward, bench_rings
from corun_ray.bench.scaling_model import ManyWorkersStep, Pool, WorkerStep, label_bytes, scaled
from corun_ray.core.choices import Encoding
from corun_ray.core.networks.corun import CORUN

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

    def layout(self, gpus: int, link_gbit: float) -> Layout:
        """Of so many GPUs."""
        inside = Link(self.node_latency_us / 1e6, self.node_gbit * BYTES_PER_GBIT)
        between = Link(self.link_latency_us / 1e6, link_gbit * BYTES_PER_GBIT)
        return Layout(gpus, self.gpus_per_node, inside, between)

    def pool(self) -> Pool | None:
        """None in pre-training."""
        if self.method == "pretrain":
            return None
        return Pool(label_bytes(self.size_px, self.encoding), self.shards, self.win_rate, self.share_blocks)


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
