"""Time the restoration of whole photographs by CORUN: megapixels per second and peak memory, by size."""

import statistics
from dataclasses import dataclass, field

import torch

from corun_ray.bench.machine import (
    Machine,
    Work,
    choose_device,
    count_work,
    measure_machine,
    time_call,
    track_peak_memory,
)
from corun_ray.core.inference.memory import fit_in_memory
from corun_ray.core.inference.restore import restore
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.acceleration import compile_network, try_compiling

COUNTED_PX = 256
"""Side of the image whose operations are counted; the count grows in proportion to the pixels."""


@dataclass(frozen=True)
class DehazeSettings:
    """The network, the photograph and the device of a measurement."""

    height_px: int
    width_px: int
    stages: int = 4
    width: int = 30
    precision: str = "fp32"
    compile: bool = False
    memory_mib: int | None = None
    """Memory for one image at work. A larger image is restored in bands or tiles. None: every image as a whole."""
    repeats: int = 3
    device: torch.device = field(default_factory=choose_device)

    @property
    def megapixels(self) -> float:
        """Megapixels of one image."""
        return self.height_px * self.width_px / 1e6


@dataclass(frozen=True)
class DehazeReport:
    """The results of a measurement."""

    settings: DehazeSettings
    image_s: float
    """Median of one image that already is in the device's memory."""
    work: Work
    """Work on the image as a whole; bands take a little more, tiles much more."""
    machine: Machine
    peak_bytes: int


def bench_dehaze(settings: DehazeSettings) -> DehazeReport:
    """Measure the restoration of a random image.

    The first run is not counted.

    Raises `ValueError` where the image does not fit into the memory, and where bands or tiles are to be compiled, and
    `CannotCompile`.
    """
    if settings.compile and settings.memory_mib is not None:
        raise ValueError("--memory-mib: bands and tiles cannot be compiled; omit either --memory-mib or --compile")
    if settings.compile:
        try_compiling(settings.device, "--compile")

    # A network with random weights; bf16 works by autocast.
    torch.manual_seed(0)
    device = settings.device
    network = CORUN(settings.stages, settings.width).eval().to(device)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    with torch.no_grad(), autocast:
        # Count operations on a small image: eagerly, so that every operation is seen.
        small = torch.rand(1, 3, COUNTED_PX, COUNTED_PX, device=device)
        counted = count_work(lambda: network(small))

        # Choose how the image runs: as a whole, or in bands or tiles that fit the memory.
        whole = compile_network(network) if settings.compile else network
        hazy = torch.rand(1, 3, settings.height_px, settings.width_px, device=device)
        runs = whole if settings.memory_mib is None else fit_in_memory(network, hazy, settings.memory_mib)

        # The first run compiles and fills caches.
        restore(runs, hazy)
        with track_peak_memory(device) as read_peak_bytes:
            times_s = [time_call(lambda: restore(runs, hazy), device) for _ in range(settings.repeats)]
            peak_bytes = read_peak_bytes()

    # Scale the count to the whole image.
    scale = settings.height_px * settings.width_px / COUNTED_PX**2
    work = Work(counted.flops * scale, counted.bytes * scale)
    return DehazeReport(settings, statistics.median(times_s), work, measure_machine(device, dtype), peak_bytes)
