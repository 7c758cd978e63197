"""Named parts of a training step: phases that profiler traces show too, and that wait for the device they run on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

from corun_ray.core.timing import PhaseTimes, phase


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
