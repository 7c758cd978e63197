"""What the commands share: exit codes, and how a command that uses Ray begins and ends."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corun_ray.service.errors import JobFailed

DONE, FAILED, WRONG_REQUEST = 0, 1, 2
"""Exit codes."""


@contextmanager
def using_ray() -> Iterator[None]:
    """Run a command that uses Ray: a stop closes what is open, and Ray's own messages go into a file.

    A `JobFailed` that leaves names that file.
    """
    # Stopped by the Jobs API or an operator, a job closes what it has opened, as at Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = _divert_stderr()

    try:
        yield
    except JobFailed as error:
        raise JobFailed(f"{error}\nRay's own messages: {log}") from None


def _divert_stderr() -> Path:
    """Send what Ray's C++ side writes to the terminal into a file; Python's own stderr stays where it was."""
    log = Path(tempfile.gettempdir()) / f"corun-ray-{os.getpid()}.log"
    terminal = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    return log
