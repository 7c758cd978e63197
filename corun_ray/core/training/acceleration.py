"""Settings that make training steps faster: memory that stays with the process, and torch.compile."""

import ctypes
import sys
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.compilers import CannotCompile, explain_failure

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of `mallopt`, as malloc.h numbers them."""

MAX_THRESHOLD = -1
"""As an unsigned threshold, the largest number."""

COMPILED_TOLERANCE = 0.05
"""Of scene and transmission; bfloat16 moves them by 0.002."""


def keep_freed_memory() -> None:
    """Keep the memory that tensors free, on Linux alone.

    By default glibc returns every block of over 32 MiB to the system, and the next tensor of that size costs a page
    fault for each 4 KiB. `docs/performance.md` has the cost, in a process's first thread and in others. torch keeps
    freed GPU memory anyway.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, MAX_THRESHOLD)


def compile_network(network: nn.Module, cuda_graphs: bool = False) -> nn.Module:
    """Compile a network at its first call.

    Other image sizes compile it again. CORUN becomes one graph without a break. The first call raises torch's own
    errors where compiling fails. On a GPU, `cuda_graphs` replays the kernels of a call as one: then call
    `torch.compiler.cudagraph_mark_step_begin` before each step.
    """
    whole = isinstance(network, CORUN)
    options: dict[str, str | int | bool | Callable] = {
        # By its own choice torch 2.14 turns the input of a depthwise convolution's backward pass into another layout.
        "force_layout_optimization": True,
        # torch 2.14 writes over results in memory that it takes for free: the transmission, of which a concatenation
        # holds an alias.
        "inplace_buffers": False,
        "allow_buffer_reuse": False,
        "triton.cudagraphs": cuda_graphs,
    }
    return cast(nn.Module, torch.compile(network, fullgraph=whole, options=options))


def check_compiled(compiled: nn.Module, network: CORUN, images: Tensor, key: str) -> None:
    """Compare what a compiled network makes of images `B 3 H W` with what the network makes itself.

    torch.compile has written over results, and it keeps kernels in a cache that does not tell one processor's
    instructions from another's. The call compiles the network, as the first call in training would; it needs the
    gradient that the caller has enabled. `key` is what asks for it.

    Raises `CannotCompile`.
    """
    with torch.no_grad():
        expected = network(images)
    found = compiled(images)

    worst = torch.stack([(ours.detach() - eager).abs().max() for ours, eager in zip(found, expected, strict=True)])
    difference = float(worst.float().max())
    if not difference <= COMPILED_TOLERANCE:
        raise CannotCompile(
            f"{key}: the compiled network restores otherwise than the network itself, by up to {difference:.2g} "
            f"(torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}); train without it"
        )


def try_compiling(device: torch.device, key: str) -> None:
    """Compile and run a sum, so that what torch.compile lacks on this machine is found before a training.

    Takes some seconds, at a machine's first time as long as g++ takes for torch's headers, which later compilations
    use too. `key` is what asks for it.

    Raises `CannotCompile`.
    """
    ones = torch.ones(8, device=device)
    try:
        torch.compile(torch.add)(ones, ones)
    except Exception as error:
        raise CannotCompile(f"{key}: {explain_failure(error)}") from None
