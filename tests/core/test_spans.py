import pytest
import torch
from torch.profiler import profile

from corun_ray.core.timing import PhaseTimes, SpanTimes, span

CPU = torch.device("cpu")


def test_whoever_listens_is_told_of_spans():
    times, phases = SpanTimes(CPU), PhaseTimes()
    for listener in (times, phases):
        with listener.listening():
            with span("student"):
                torch.ones(10).sum()
            with pytest.raises(OSError), span("teacher"):
                raise OSError
    with span("losses"):
        pass
    assert set(times.seconds) == set(phases.seconds) == {"student", "teacher"}
    assert min(times.seconds.values()) > 0


def test_a_profiler_shows_spans_by_name():
    with profile() as profiler, span("student"):
        torch.ones(10).sum()
    assert "student" in {event.key for event in profiler.key_averages()}
