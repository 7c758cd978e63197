"""Memory that a process keeps, for steps that ask for the same amounts again and again.

torch.compile as this project uses it."""

import ctypes
import sys
from typing import cast

import torch
from torch import nn

from corun_ray.core.networks.corun import CORUN

# What `mallopt` can set, as malloc.h numbers it.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1  # as a threshold, the largest number


def keep_freed_memory() -> None:
    """Has this process keep what its tensors free, instead of giving it back to the system; on Linux alone.

    By itself glibc returns every block of over 32 MiB, and the next tensor of that size costs a page fault for each 4
    KiB (`docs/performance.md` has what that costs, in a process's first thread and in others). torch's GPU memory is
    kept anyway.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)


def compile_network(network: nn.Module) -> nn.Module:
    """The same network, compiled at its first call and again for other sizes; CORUN as one graph without a break.

    Raises torch's own errors at the first call where the network cannot be compiled.
    """
    # Left to itself, torch 2.14 turns what enters the backward pass of a depthwise convolution into another layout.
    layout = {"force_layout_optimization": True}
    return cast(nn.Module, torch.compile(network, fullgraph=isinstance(network, CORUN), options={**layout}))
