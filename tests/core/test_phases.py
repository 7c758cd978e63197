import threading
import time

import pytest

from corun_ray.core.timing import PHASES, PhaseTimes, phase


def test_a_listener_adds_up_the_phases_of_its_thread_also_those_that_fail():
    times = PhaseTimes()
    with times.listening():
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
