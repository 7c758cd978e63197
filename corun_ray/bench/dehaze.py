"""Times the restoration of whole photographs by CORUN: megapixels a second and memory, by size."""

import statistics
from dataclasses import dataclass, field

import torch

from corun_ray.bench.machine import Machine, Work, count_work, measure_machine, peak_memory, seconds
from corun_ray.core.inference.memory import fit_in_memory
from corun_ray.core.inference.restore import restore
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.acceleration import compile_network

COUNTED_PX = 256
"""Side of the image on which operations are counted: all grow as the number of pixels does."""


@dataclass(frozen=True)
class DehazeSettings:
    """What is measured."""

    height_px: int
    width_px: int
    stages: int = 4
    width: int = 30
    precision: str = "fp32"
    compile: bool = False
    memory_mib: int | None = None
    """What an image at work may take: beyond it, it is restored in bands or in tiles. None: the image as a whole."""
    repeats: int = 3
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def megapixels(self) -> float:
        """Of one image."""
        return self.height_px * self.width_px / 1e6


@dataclass(frozen=True)
class DehazeReport:
    """What was found out."""

    settings: DehazeSettings
    image_s: float
    """Median of an image that is in the device's memory already."""
    work: Work
    """Of the image as a whole: bands work a little more, tiles much."""
    machine: Machine
    peak_bytes: int


def bench_dehaze(settings: DehazeSettings) -> DehazeReport:
    """Restores a random image several times, the first of them not counted.

    Raises ValueError where it does not fit into the memory, or what fits cannot be compiled.
    """
    if settings.compile and settings.memory_mib is not None:
        raise ValueError("--memory-mib: bands and tiles are not compiled; leave out either this or --compile")
    torch.manual_seed(0)
    device = settings.device
    network = CORUN(settings.stages, settings.width).eval().to(device)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.no_grad(), autocast:
        small = torch.rand(1, 3, COUNTED_PX, COUNTED_PX, device=device)
        counted = count_work(lambda: network(small))
        whole = compile_network(network) if settings.compile else network
        hazy = torch.rand(1, 3, settings.height_px, settings.width_px, device=device)
        runs = whole if settings.memory_mib is None else fit_in_memory(network, hazy, settings.memory_mib)
        restore(runs, hazy)
        with peak_memory(device) as peak:
            times = [seconds(lambda: restore(runs, hazy), device) for _ in range(settings.repeats)]
            peak_bytes = peak()
    scale = settings.height_px * settings.width_px / COUNTED_PX**2
    work = Work(counted.flops * scale, counted.bytes * scale)
    return DehazeReport(settings, statistics.median(times), work, measure_machine(device, dtype), peak_bytes)
