"""Ctrl-C and SIGTERM: the first closes what is open, later ones do no harm, and closing never takes for ever."""

import os
import signal
import sys
import threading
from types import FrameType

CLOSE_LIMIT_S = 25.0
"""How long closing may take. A served model lets requests in work end, which takes up to 10 s."""
AT_ONCE = 3
"""The number of the signal that ends the process as it stands."""


class StopSignals:
    """The handler of both signals; `exit_code` is that of a process that is ended as it stands."""

    def __init__(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._count = 0

    def install(self) -> None:
        """Handle both signals from now on.

        A SIGINT that is ignored stays so: a shell script has what it starts in the background ignore it.
        """
        signal.signal(signal.SIGTERM, self)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise `KeyboardInterrupt` at the first signal, and end the process at the third."""
        self._count += 1
        if self._count == 1:
            limit = threading.Timer(CLOSE_LIMIT_S, end_process, [self._exit_code])
            limit.daemon = True
            limit.start()
            raise KeyboardInterrupt

        if self._count >= AT_ONCE:
            end_process(self._exit_code)
        write_line("stopping already: what is open is being closed (once more ends it as it stands)")


def end_process(exit_code: int) -> None:
    """End this process as it stands, with a line."""
    write_line("ended before all was closed; --resume continues a run from its last checkpoint")
    os._exit(exit_code)


def write_line(text: str) -> None:
    """Write to stderr without Python's buffer, which the code that a signal interrupts may hold."""
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
