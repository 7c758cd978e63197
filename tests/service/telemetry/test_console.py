"""What a person sees of a job, on a terminal and in a log."""

import os
import pty
import re
import subprocess
import sys

import pytest

from corun_ray.service.telemetry import console as module
from corun_ray.service.telemetry.console import LINE_EVERY_S, Console

JOB = """
from corun_ray.service.telemetry.console import Console

with Console() as console:
    console.header("a job", {"data": "here [1]", "storage": "there"})
    console.wait("the workers start: 3 s", 10)
    for step in range(1, 11):
        console.progress(step, 10, "step", ["loss 0.1", "x" * 200])
        if step == 5:
            console.say("  a note [red]")
    console.footer("done", {"took": "0:01"}, ["look"])
"""


def run_on_a_terminal(program: str, **env: str) -> str:
    """Return all that a program writes to a terminal of 80 columns."""
    master, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm", **env}
    with subprocess.Popen([sys.executable, "-c", program], stdout=terminal, stderr=terminal, env=environment) as job:
        os.close(terminal)
        said = b""
        while True:
            try:
                said += os.read(master, 4096)
            except OSError:
                break
        assert job.wait() == 0, said
    os.close(master)
    return said.decode()


def read_screen(said: str) -> list[str]:
    """Return the lines that remain on the screen: of each, what stands behind its last erasure."""
    assert "\x1b[1A" not in said, "the live line took two"
    lines = [re.split(r"\r\x1b\[2K", line)[-1] for line in said.split("\n")]
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", line).rstrip() for line in lines]


def test_a_terminal_has_one_live_line_and_every_note_whole() -> None:
    said = run_on_a_terminal(JOB)
    assert "the workers start: 3 s" in said, "until the first step"
    *lines, last = read_screen(said)
    assert lines[:4] == ["", "a job", "  data       here [1]", "  storage    there"]
    assert lines[4] == "  a note [red]"
    assert re.match(r"\S+ step 10/10 .* loss 0\.1  x+…$", lines[5]) and len(lines[5]) == 80
    assert lines[6:] == ["  done", "  took       0:01", "  next       look"] and last == ""


def test_the_cursor_comes_back_where_a_job_dies() -> None:
    program = JOB.replace('console.say("  a note [red]")', "break") + "\nprint('after')"
    said = run_on_a_terminal(program)
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1
    dying = JOB.replace('console.say("  a note [red]")', "raise SystemExit(0)")
    assert run_on_a_terminal(dying).endswith("\x1b[?25h")


def test_no_colour_is_plain_and_a_dumb_terminal_has_lines() -> None:
    assert "\x1b[3" in run_on_a_terminal(JOB)
    assert "\x1b[3" not in run_on_a_terminal(JOB, NO_COLOR="1")
    assert "\x1b" not in run_on_a_terminal(JOB, TERM="dumb")


def test_a_log_has_a_line_every_15_s_and_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    console = Console()
    console.header("a job", {})
    for step in range(1, 41):
        now_s[0] += 1
        console.progress(step, 40, "step", ["loss 0.1"])
    console.progress(40, 40, "step")
    assert LINE_EVERY_S == 15
    assert capsys.readouterr().out.splitlines() == [
        "",
        "a job",
        "  step 15/40  1.00/s  ETA 0:25  loss 0.1",
        "  step 30/40  1.00/s  ETA 0:10  loss 0.1",
        "  step 40/40  1.00/s  ETA 0:00  loss 0.1",
    ]
