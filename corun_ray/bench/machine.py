"""What a device can do, as far as the network needs it, and what a piece of work asks of it: the floor of its time."""

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
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """A device's measured limits."""

    flops_per_s: float
    """Of large matrix products in the precision asked for."""
    bytes_per_s: float
    """Read and written by a copy of memory."""


@dataclass(frozen=True)
class Work:
    """What was counted while something ran."""

    flops: float
    """Of convolutions and matrix products, an addition and a multiplication being two."""
    bytes: float
    """Read and written by all operations, had each its own pass over memory."""

    def floor_s(self, machine: Machine) -> tuple[float, float]:
        """Seconds below which neither arithmetic nor, one operation at a time, memory traffic can be."""
        return self.flops / machine.flops_per_s, self.bytes / machine.bytes_per_s


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, until the device is done."""
    times = SpanTimes(device)
    with times.add_time("call"):
        run()
    return times.seconds["call"]


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Medians of a few large matrix products in `dtype` and of a few large copies."""
    side = MATRIX_SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = _median(lambda: matrix @ matrix, device)
    copy_s = _median(lambda: target.copy_(source), device)
    return Machine(2 * side**3 / product_s, 2 * source.nbytes / copy_s)


def count_work(run: Callable[[], object]) -> Work:
    """Runs it once, eagerly, and counts."""
    traffic = _Traffic()
    formulae = {torch.ops.aten.convolution_backward: _flops_of_convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulae) as flops, traffic:
        run()
    return Work(flops.get_total_flops(), traffic.bytes)


def _flops_of_convolution_backward(
    gradient: list[int], inputs: list[int], weight: list[int], *rest: Any, **_: Any
) -> int:
    """That of the input and that of the weight ask for what the forward pass did, each.

    torch 2.14 counts every gradient as if no convolution had groups: depthwise ones as many times too dear as they
    have channels.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest
    pixels = math.prod((inputs if transposed else gradient)[2:])
    return 2 * gradient[0] * pixels * math.prod(weight) * sum(wanted[:2])


class _Traffic(TorchDispatchMode):
    """Adds up the sizes of what every operation reads and writes; views read and write nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not func.is_view:
            self.bytes += sum(tensor.nbytes for tensor in (*inputs, *outputs))
        return result


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives what says the most bytes in use since it was entered: of the GPU's tensors, or of this whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    resets = Path("/proc/self/clear_refs")
    if resets.exists():
        resets.write_text("5")
    yield _peak_resident_bytes


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _median(run: Callable[[], object], device: torch.device) -> float:
    run()
    return statistics.median(seconds(run, device) for _ in range(REPEATS))
