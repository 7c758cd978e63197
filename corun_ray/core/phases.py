"""Named parts of making a sample, for whoever wants to know how long each takes.

As `spans`, but without torch: a process that only makes samples need not import it.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PHASES = ("read", "decode", "depth", "synthesis", "jpeg", "resize", "strong view")
"""Of a sample, in order; a sample of two images goes through some of them twice."""

_listening: ContextVar["PhaseTimes | None"] = ContextVar("listening", default=None)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks the work done inside as one of `PHASES`; they do not lie within each other."""
    times = _listening.get()
    if times is None:
        yield
        return
    started_s = time.perf_counter()
    try:
        yield
    finally:
        times.seconds[name] += time.perf_counter() - started_s


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
