"""Ctrl-C and SIGTERM, once and again, in a process of their own."""

import signal
import subprocess
import sys

import pytest

from tests.conftest import heeding_ctrl_c

COMMAND = """
import sys, time
from corun_ray.cli import signals
from corun_ray.core.errors import explain_stop
signals.CLOSE_LIMIT_S = float(sys.argv[1])
signals.StopSignals(1).install()
try:
    with explain_stop(lambda: "the run: here; --resume continues it"):
        print("runs", flush=True)
        time.sleep(60)
except KeyboardInterrupt as stop:
    print(stop, flush=True)
    time.sleep(float(sys.argv[2]))
    print("closed", flush=True)
"""


def start(limit_s, close_s):
    arguments = [sys.executable, "-c", COMMAND, str(limit_s), str(close_s)]
    with heeding_ctrl_c():
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "runs\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_neither_breaks_the_closing_nor_is_passed_over(number):
    process = start(30, 0.5)
    process.send_signal(number)
    assert process.stdout.readline() == "the run: here; --resume continues it\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, "closed\n")
    assert errors.strip() == "stopping already: what is open is being closed (once more ends it as it stands)"


def test_a_third_signal_ends_the_process_as_it_stands():
    process = start(30, 30)
    for line in ("the run: here; --resume continues it\n", ""):
        process.send_signal(signal.SIGINT)
        if line:
            assert process.stdout.readline() == line
    assert "stopping already" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (1, "")
    assert "ended before all was closed; --resume continues a run from its last checkpoint" in errors


def test_closing_that_takes_for_ever_is_ended():
    process = start(0.3, 30)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "ended before all was closed" in errors
