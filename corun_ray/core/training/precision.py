"""Which arithmetic a training uses: bfloat16 where its devices are fast at it, else float32.

Facts are read from a device, or measured, apart from the choice, which can so be tried without the device.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from corun_ray.core.choices import Precision
from corun_ray.core.timing import synchronize

FAST_CUDA_CAPABILITY = (8, 0)
"""Compute capability from which GPUs have tensor cores for bfloat16."""
CPU_FEATURES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""Instructions that make bfloat16 fast on a CPU, the fastest first: torch's names, and those that people know."""

MATRIX_SIDE = 256
"""Rows and columns of the multiplied matrices: a product of 34 million operations, or 0.14 s on a slow CPU."""
MEASURING_S = 0.2
"""How long the product of a precision is repeated; the first one may take longer."""


@dataclass(frozen=True)
class Processor:
    """What tells whether a GPU or CPU is fast at bfloat16."""

    cuda_capability: tuple[int, int] | None = None
    """Compute capability of a GPU; None for a CPU."""
    cpu_features: tuple[str, ...] = ()
    """Instructions for bfloat16 that a CPU has, the fastest first."""
    is_held_back: bool = False
    """Whether variables of the environment keep torch from using these."""


class Bfloat16(NamedTuple):
    """Whether a device is fast at bfloat16, and the reason."""

    is_fast: bool
    reason: str


@dataclass(frozen=True)
class PrecisionChoice:
    """The arithmetic of a training; its text is `bf16 (auto: AVX512-BF16)`, or `bf16` where nothing was chosen."""

    name: Literal["fp32", "bf16"]
    reason: str | None = None
    """Why it was chosen; None: it was asked for."""

    def __str__(self) -> str:
        return self.name if self.reason is None else f"{self.name} (auto: {self.reason})"


def read_processor(device: torch.device) -> Processor:
    """Read the facts about a device."""
    if device.type == "cuda":
        return Processor(cuda_capability=torch.cuda.get_device_capability(device))

    found = torch.cpu.get_capabilities()
    features = tuple(name for flag, name in CPU_FEATURES.items() if found.get(flag))

    # The processor's flags stay, whatever ATEN_CPU_CAPABILITY (torch's own kernels) and ONEDNN_MAX_CPU_ISA (oneDNN's
    # products and convolutions) say. oneDNN alone says yes on any processor with AVX-512.
    uses_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    uses_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    is_held_back = bool(features) and not (uses_avx512 and uses_bfloat16)
    return Processor(cpu_features=features, is_held_back=is_held_back)


def judge_bfloat16(processor: Processor) -> Bfloat16:
    """Judge whether a device is fast at bfloat16 by what it is."""
    if processor.cuda_capability is not None:
        name = "compute capability {}.{}".format(*processor.cuda_capability)
        is_fast = processor.cuda_capability >= FAST_CUDA_CAPABILITY
        return Bfloat16(is_fast, name if is_fast else f"{name} has no fast bfloat16")

    if not processor.cpu_features:
        return Bfloat16(False, "the processor has no fast bfloat16")
    name = processor.cpu_features[0]
    if processor.is_held_back:
        return Bfloat16(False, f"the environment keeps torch from the processor's {name}")
    return Bfloat16(True, name)


def choose_precision(asked: Precision, bfloat16: Bfloat16, num_slow: int = 0, num_workers: int = 1) -> PrecisionChoice:
    """Choose the precision that all workers of a training use: bf16 only where every one of them is fast at it.

    `bfloat16` is the judgement of the worker that asks, `num_slow` the number of workers that are slow at it. All
    workers make the same choice; where all are alike, each gives its own reason.
    """
    if asked != "auto":
        return PrecisionChoice(asked)
    if 0 < num_slow < num_workers:
        return PrecisionChoice("fp32", f"no fast bfloat16 on {num_slow} of {num_workers} workers")
    return PrecisionChoice("bf16" if bfloat16.is_fast else "fp32", bfloat16.reason)


def measure_slowdown(device: torch.device) -> float:
    """Return how many times as long a matrix product takes in bfloat16 as in float32.

    Takes about half a second. On a CPU one thread computes: where several processes share the cores, threads that
    wait for each other would be all that is seen.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        half_s, single_s = (_time_product(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    finally:
        torch.set_num_threads(num_threads)
    return half_s / single_s


def _time_product(device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of a matrix product, the least of several."""
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=dtype)

    # The first product sets libraries up.
    _time_call(lambda: matrix @ matrix, device)
    ends_s = time.perf_counter() + MEASURING_S
    least_s = _time_call(lambda: matrix @ matrix, device)
    while time.perf_counter() < ends_s:
        least_s = min(least_s, _time_call(lambda: matrix @ matrix, device))
    return least_s


def _time_call(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, until the device is done."""
    started_s = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started_s
