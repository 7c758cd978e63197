"""What a driver keeps for itself when it connects to Ray."""

import os
import subprocess
import sys

DRIVER = """
import signal, time
from corun_ray.service.cluster.connect import connect
signal.signal(signal.SIGTERM, signal.default_int_handler)
connect()
try:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(1)
except KeyboardInterrupt:
    time.sleep(4)
    print("closed")
"""


def test_a_driver_that_is_terminated_has_the_time_to_close_what_it_opened():
    environment = os.environ | {"RAY_ADDRESS": ""}
    driver = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True, env=environment)
    assert (driver.returncode, driver.stdout) == (0, "closed\n"), driver.stderr
