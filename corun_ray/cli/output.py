"""The streams of a command: what happens where nobody can read or keep its output any more.

A reader goes away (`corun-ray run … | head`), a disk is full, a terminal is closed, or there never was an output. Such
output is dropped: a training must not die of it, nor a thread of its. A command whose output is its result fails.
"""

import errno
import io
import os
import select
import sys
from typing import TextIO

from corun_ray.service.errors import JobFailed

STDOUT, STDERR = 1, 2
FOLLOWING = ("jobs follow", "submit")
"""Commands that show what goes on elsewhere: without a reader there is nothing left to do."""
SHOWING = ("check", "doctor", "schema", "pool ls", "pool diff", "jobs ls", "jobs status", "weights ls", "bench")
"""Commands whose result is their output. All others leave files, models or jobs."""


class OutputLost(JobFailed):
    """The output of a command can be written no more; the message tells why."""


class LossyFile(io.RawIOBase):
    """A file descriptor that drops what it cannot write, from the first such error on."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.error: OSError | None = None
        """The first error of a write."""
        self.warning: str | None = None
        """The line for stderr at the first error, if any."""
        self.is_vital = False
        """Whether the first error is raised, as `OutputLost`."""

    def writable(self) -> bool:
        """Return True: this is what the file is for."""
        return True

    def fileno(self) -> int:
        """Return the number of the descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Return whether the descriptor is a terminal."""
        return os.isatty(self._number)

    def write(self, data) -> int:  # type: ignore[no-untyped-def]  # any buffer, as in io
        """Write some of the bytes, or drop them all; return how many."""
        if self.error is None:
            try:
                return self._write(data)
            except OSError as error:
                self.error = error
                self._report(error)
        return len(data)

    def _write(self, data) -> int:  # type: ignore[no-untyped-def]
        """Write some of the bytes; wait where a terminal or a pipe is full."""
        while True:
            try:
                return os.write(self._number, data)
            except BlockingIOError:
                select.select([], [self._number], [])

    def _report(self, error: OSError) -> None:
        """Tell of the first error: by raising it, or on stderr."""
        if self.is_vital:
            raise OutputLost(describe_loss(error))
        if self.warning is not None:
            print(f"{describe_loss(error)}; {self.warning}", file=sys.stderr)


class Output:
    """The stdout of a command, and what the loss of it means."""

    def __init__(self, file: LossyFile | None) -> None:
        """Take the descriptor that stdout writes to; None where stdout is not the process's own."""
        self._file = file
        # Until a command is known, there may be help to print.
        self._is_result = True

    def expect(self, command: str, *, can_wait: bool = True) -> None:
        """Say which command writes, by its words: `pool ls`; `can_wait` is False for one that follows nothing."""
        self._is_result = command.startswith(SHOWING)
        if self._file is None:
            return
        if command.startswith(FOLLOWING) and can_wait:
            self._file.is_vital = True
        elif not self._is_result:
            self._file.warning = "the rest of it is dropped, and the work goes on"

    def settle(self, code: int) -> int:
        """Return the exit code of the command, given what became of its output."""
        try:
            sys.stdout.flush()
        except OutputLost:
            return code or 1
        # A reader that has gone has seen enough.
        error = None if self._file is None else self._file.error
        if error is None or not self._is_result or error.errno == errno.EPIPE:
            return code
        print(describe_loss(error), file=sys.stderr)
        return code or 1


def describe_loss(error: OSError) -> str:
    """Describe why output is lost, in one line."""
    return f"the output cannot be written: {os.strerror(error.errno or errno.EIO)}"


def protect_output() -> Output:
    """Have stdout and stderr of this process outlive the loss of their readers."""
    was_closed = _open_missing()

    # Streams that another has put in their place (a test) are the other's matter.
    file = None
    if sys.stdout is sys.__stdout__:
        file = LossyFile(STDOUT)
        sys.stdout = wrap_stream(file, sys.__stdout__)
        if STDOUT in was_closed:
            file.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
    if sys.stderr is sys.__stderr__:
        sys.stderr = wrap_stream(LossyFile(STDERR), sys.__stderr__)
    return Output(file)


def wrap_stream(file: LossyFile, like: TextIO | None = None) -> TextIO:
    """Return a text stream onto a descriptor, with the encoding and buffering of another stream.

    A character that the encoding lacks is written as its code, not raised as an error.
    """
    is_unbuffered = getattr(like, "write_through", False)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(like, "line_buffering", True),
        write_through=is_unbuffered,
    )


def _open_missing() -> set[int]:
    """Open what of stdin, stdout and stderr is closed, onto nothing; return their numbers.

    The next file that is opened would take the number, and a library that prints would write into it.
    """
    was_closed = set()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one.
            os.open(os.devnull, os.O_RDWR)
            was_closed.add(number)
    return was_closed
