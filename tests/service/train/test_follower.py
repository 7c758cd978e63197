from corun_ray.service.errors import find_root_cause
from corun_ray.service.telemetry.console import Rate, format_duration

CHAIN = """Traceback (most recent call last):
  File "a.py", line 1, in f
ValueError: the depth map is upside down

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in g
ray.exceptions.UserCodeException: UDF failed to process a data block.
"""


def test_the_root_cause_is_what_happened_first():
    assert find_root_cause(CHAIN) == "ValueError: the depth map is upside down"
    assert find_root_cause("Traceback:\n  x\nKeyError: 3\n") == "KeyError: 3"


def test_the_rate_rests_on_recent_progress(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    rate = Rate()
    assert rate.update(0) is None
    for done in range(1, 41):
        now[0] += 1.0
        assert abs(rate.update(done) - 1.0) < 1e-9
    for done in range(41, 81):
        now[0] += 0.25
        fast = rate.update(done)
    assert 1.5 < fast < 4.0, "the last half minute was mostly fast"
    now[0] += 100.0
    assert 0 < rate.update(81) < 0.1, "slow work still has a rate"


def test_durations_read_well():
    assert (format_duration(59.9), format_duration(125), format_duration(3725)) == ("0:59", "2:05", "1:02:05")
