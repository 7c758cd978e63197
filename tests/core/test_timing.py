import threading
import time

import pytest
import torch
from torch.profiler import profile

from corun_ray.core.timing import PHASES, PhaseTimes, SpanTimes, phase, span

CPU = torch.device("cpu")


def test_a_listener_adds_up_the_phases_of_its_thread_also_those_that_fail():
    times = PhaseTimes()
    with times.listen():
        for _ in range(2):
            with phase("decode"):
                time.sleep(0.01)
        with pytest.raises(OSError), phase("read"):
            raise OSError
        other = threading.Thread(target=lambda: phase("jpeg").__enter__())
        other.start()
        other.join()
    with phase("depth"):
        pass
    assert set(times.seconds) == {"decode", "read"} <= set(PHASES)
    assert times.seconds["decode"] >= 0.02


def test_whoever_listens_is_told_of_spans():
    times, phases = SpanTimes(CPU), PhaseTimes()
    for listener in (times, phases):
        with listener.listen():
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
