"""Named parts of a training step: for profiler traces, and for whoever wants to know how long each takes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

_listening: ContextVar["SpanTimes | None"] = ContextVar("listening", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Marks the work done inside; costs some microseconds where nobody listens."""
    times = _listening.get()
    with record_function(name):
        if times is None:
            yield
        else:
            with times.timed(name):
                yield


class SpanTimes:
    """Seconds spent in every span while it listens, spans of one name added up.

    On CUDA the device is waited for at both ends of a span, so that each answers for its own work: a step is slower
    while this listens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens to the spans of this thread."""
        token = _listening.set(self)
        try:
            yield
        finally:
            _listening.reset(token)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time until it is left to that of `name`."""
        started_s = self.now_s()
        yield
        self.seconds[name] += self.now_s() - started_s

    def now_s(self) -> float:
        """The clock when all work that was begun on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
