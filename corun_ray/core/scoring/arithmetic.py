"""How the networks of scorers compute on their device: in which precision, and as CUDA graphs.

A step rates the same few shapes again and again: whole images, full chunks of blocks, and what is left of them. So a
GPU can replay the kernels of a shape as one graph, without the host's time for each kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from corun_ray.core.choices import ScorerPrecision
from corun_ray.core.errors import UserError, format_error

Function = Callable[[Tensor], Tensor]
"""A function of images `B 3 H W` that makes one tensor, without a gradient."""

Capture = Callable[[Function, Tensor], Function]
"""Captures a function for images like the given ones; returns one that replays it."""

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}

MAX_GRAPHS = 8
"""Shapes of one scorer that are replayed; each holds memory. Further shapes run as they are."""

WARM_UP_CALLS = 3
"""Calls before a capture, in which libraries choose their kernels."""


class CannotCapture(UserError):
    """A scorer that cannot be captured as a CUDA graph; the message is one line."""


def use_precision(precision: ScorerPrecision, device: torch.device, auto: torch.dtype | None = None) -> torch.autocast:
    """Compute in a precision within the context, whatever the caller's own autocast.

    `auto` is the type that `auto` stands for on this device; None: float32.
    """
    dtype = auto if precision == "auto" else HALF.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class Graphs:
    """A function of images that is captured for each shape at its second call, and replayed from then on.

    The numbers are those of the function. A call that wants a gradient is never replayed.
    """

    def __init__(self, name: str, function: Function, capture: Capture) -> None:
        """Prepare the graphs of `function`; `name` stands for it in errors."""
        self._name, self._function, self._capture = name, function, capture
        self._seen: set[torch.Size] = set()
        self._replays: dict[torch.Size, Function] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Call the function, or replay it.

        Raises `CannotCapture`.
        """
        if torch.is_grad_enabled() and images.requires_grad:
            return self._function(images)

        shape = images.shape
        if shape not in self._seen or (shape not in self._replays and len(self._replays) == MAX_GRAPHS):
            self._seen.add(shape)
            return self._function(images)

        if shape not in self._replays:
            try:
                self._replays[shape] = self._capture(self._function, images)
            except RuntimeError as error:
                reason = format_error(error)
                raise CannotCapture(f"{self._name} cannot be replayed as a CUDA graph ({reason})") from None
        return self._replays[shape](images)


class CudaCapture:
    """Captures functions as CUDA graphs.

    The graphs share the memory of what they make on the way, so no two of them may run at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, images: Tensor) -> Function:
        """Capture a function's kernels for images of one shape; see `Capture`.

        Constants that the function makes are made on the GPU: a graph cannot copy from the host.
        """
        given, device, stream = images.detach().clone(), self._device, self._stream

        # Warm up in the stream of the capture.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad(), device:
            for _ in range(WARM_UP_CALLS):
                function(given)
        torch.cuda.current_stream(device).wait_stream(stream)

        # Other threads of the process may use the GPU meanwhile.
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local")
        with capture, torch.no_grad(), device:
            made = function(given)

        def replay(images: Tensor) -> Tensor:
            """Replay the kernels on other images. The next replay overwrites what they make, so hand out a copy."""
            given.copy_(images)
            graph.replay()
            return made.clone()

        return replay
