"""Named parts of work, for whoever wants to know how long each takes: those of making a sample are named here.

Without torch, since a process that only makes samples need not import it; `spans` adds what a device needs.


Named parts of a training step: phases that profiler traces show too, and that wait for the device they run on."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

PHASES = ("read", "decode", "depth", "synthesis", "jpeg", "resize", "strong view")
"""Of a sample, in order; a sample of two images goes through some of them twice."""

_listening: ContextVar["PhaseTimes | None"] = ContextVar("listening", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks the work done inside; phases do not lie within each other."""
    times = _listening.get()
    if times is None:
        yield
    else:
        with times.timed(name):
            yield


class PhaseTimes:
    """Seconds spent in every phase while it listens, phases of one name added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to the phases of this thread."""
        token = _listening.set(self)
        try:
            yield
        finally:
            _listening.reset(token)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time until it is left, also by an error, to that of `name`."""
        started_s = self.now_s()
        try:
            yield
        finally:
            self.seconds[name] += self.now_s() - started_s

    def now_s(self) -> float:
        """The clock that phases are timed by."""
        return time.perf_counter()


@contextmanager
def span(name: str) -> Iterator[None]:
    """Marks the work done inside; costs some microseconds where nobody listens."""
    with record_function(name), phase(name):
        yield


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SpanTimes(PhaseTimes):
    """Seconds spent in every span while it listens.

    On CUDA the device is waited for at both ends of a span, so that each answers for its own work: a step is slower
    while this listens.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def now_s(self) -> float:
        """The clock when all work that was begun on the device is done."""
        synchronize(self._device)
        return super().now_s()
