"""Measure a device's limits, and count the work of a call.

Both together give the floor of the call's time: the seconds that arithmetic and memory traffic take at the least.
"""

import contextlib
import math
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from corun_ray.core.timing import SpanTimes

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the multiplied matrices, by type of device. Its keys are the devices that can be measured."""
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Size of the copied tensor, by type of device."""
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """A device's measured limits."""

    flops_per_s: float
    """Rate of large matrix products, in the precision that is asked for."""
    bytes_per_s: float
    """Rate of a memory copy, bytes read plus bytes written."""


@dataclass(frozen=True)
class Work:
    """The counted work of a call."""

    flops: float
    """Operations of convolutions and matrix products; a multiplication with its addition counts as two."""
    bytes: float
    """Bytes read and written by all operations, if each makes a pass over memory of its own."""

    def compute_floor_s(self, machine: Machine) -> tuple[float, float]:
        """Return the least seconds for arithmetic and for memory traffic.

        The traffic is that of one operation at a time: fused operations may need less.
        """
        return self.flops / machine.flops_per_s, self.bytes / machine.bytes_per_s


def choose_device() -> torch.device:
    """Return CUDA's device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_call(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, until the device is done."""
    times = SpanTimes(device)
    with times.add_time("call"):
        run()
    return times.seconds["call"]


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a device's limits.

    These are medians of large matrix products in `dtype` and of large copies.
    """
    # A square product takes 2 n^3 operations.
    side = MATRIX_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    product_s = _time_median(lambda: matrix @ matrix, device)

    # A copy reads and writes every byte once.
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _time_median(lambda: target.copy_(source), device)

    return Machine(2 * side**3 / product_s, 2 * source.nbytes / copy_s)


def _time_median(run: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of `REPEATS` calls.

    One more call comes first and is not counted.
    """
    run()
    return statistics.median([time_call(run, device) for _ in range(REPEATS)])


def count_work(run: Callable[[], object]) -> Work:
    """Count the work of one eager call."""
    traffic = _Traffic()
    formulae = {torch.ops.aten.convolution_backward: _count_convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulae) as flops, traffic:
        run()
    return Work(flops.get_total_flops(), traffic.bytes)


def _count_convolution_backward_flops(
    gradient: list[int], inputs: list[int], weight: list[int], *rest: Any, **_: Any
) -> int:
    """Count the operations of a convolution's backward pass.

    The arguments are the shapes of its tensors. The gradient of the input and that of the weight each take as many as
    the forward pass. torch 2.14 counts every gradient as if no convolution had groups, which multiplies those of
    depthwise ones by their channels.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = rest
    pixels = math.prod((inputs if transposed else gradient)[2:])
    forward_flops = 2 * gradient[0] * pixels * math.prod(weight)

    # The mask says which of the gradients of input and weight are computed; the bias's is not counted.
    return forward_flops * sum(output_mask[:2])


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that every operation reads and writes; views read and write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result

        # Tensors of the arguments are read, those of the result are written.
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.bytes += leaf.nbytes
        return result


@contextlib.contextmanager
def track_peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak memory.

    The peak is the most bytes in use since the block was entered.

    On CUDA these are the bytes of the device's tensors, on a CPU the resident memory of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return

    # Linux resets a process's peak on "5"; elsewhere the peak counts from the start of the process.
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        resets.write_text("5")
    yield _read_peak_resident_bytes


def _read_peak_resident_bytes() -> int:
    """Return the peak of this process's resident memory."""
    # Linux: a line such as "VmHWM:  123456 kB".
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024

    # getrusage counts in bytes on macOS, in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
