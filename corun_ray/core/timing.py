"""Timing of named parts of work: phases of making a sample, spans of a training step.

A phase costs next to nothing while nobody listens. A span is a phase that profiler traces show too. Spans alone import
torch: the many processes that make samples do without.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PHASES = ("read", "decode", "depth", "synthesis", "jpeg", "resize", "strong view")
"""Phases of making a sample, in order; a sample of two images passes some of them twice."""

_listening: ContextVar["PhaseTimes | None"] = ContextVar("listening", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Time the work inside as one phase.

    Only where this thread has a listener. Phases must not be nested.
    """
    times = _listening.get()
    if times is None:
        yield
    else:
        with times.add_time(name):
            yield


@contextmanager
def span(name: str) -> Iterator[None]:
    """Time the work inside and show it in traces.

    A span is a phase that the profiler records. Costs some microseconds where nobody listens.
    """
    from torch.profiler import record_function

    with record_function(name), phase(name):
        yield


def synchronize(device: "torch.device") -> None:
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


class PhaseTimes:
    """Seconds spent in every phase while listening; phases of one name are added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Listen to the phases of this thread."""
        token = _listening.set(self)
        try:
            yield
        finally:
            _listening.reset(token)

    @contextmanager
    def add_time(self, name: str) -> Iterator[None]:
        """Add the time of the work inside to `name`.

        Also where the work raises.
        """
        started_s = self.now_s()
        try:
            yield
        finally:
            self.seconds[name] += self.now_s() - started_s

    def now_s(self) -> float:
        """Return the clock's time in seconds."""
        return time.perf_counter()


class SpanTimes(PhaseTimes):
    """Seconds spent in every span while listening, on a device that may work asynchronously.

    On CUDA, both ends of a span wait for the device, so that each span is charged with its own work. A training step
    is slower while this listens.
    """

    def __init__(self, device: "torch.device") -> None:
        super().__init__()
        self._device = device

    def now_s(self) -> float:
        """Return the clock's time once the device is idle."""
        synchronize(self._device)
        return super().now_s()
