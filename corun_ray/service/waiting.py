"""Waiting in words: what is awaited is said after some seconds, and again now and then."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

Say = Callable[[str], None]
"""Shows a line to the person who waits."""

FIRST_WORD_S = 4.0
WORD_EVERY_S = 15.0
"""A wait is told after the first, then again after each of the second."""
LAST_RESORT_S = 10.0
"""How much longer a wait within a library's own code may take, which heeds no signal."""
WRONG_REQUEST = 2


class GaveUp(BaseException):
    """A wait that took too long. It is no `Exception`, since libraries catch those and try again."""


def print_line(text: str) -> None:
    """Show a line on stderr, where there is no console of a job."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def announce_wait(what: str, say: Say = print_line, first_word_s: float = FIRST_WORD_S) -> Iterator[None]:
    """Say what is awaited, as long as the block takes."""
    is_over = threading.Event()
    thread = threading.Thread(target=_announce, args=(what, say, is_over, first_word_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _announce(what: str, say: Say, is_over: threading.Event, first_word_s: float) -> None:
    """Say what is awaited until it is over."""
    waited_s, pause_s = 0.0, first_word_s
    while not is_over.wait(pause_s):
        waited_s, pause_s = waited_s + pause_s, WORD_EVERY_S
        say(f"waiting for {what}: {waited_s:.0f} s")


class Meanwhile:
    """Does things one after the other in another thread, while the block of a `with` waits for something else.

    The end of the block waits for them. The first error of theirs ends them, and is raised there. An error of the block
    itself comes first; what has not begun is then left out, and what hangs is left behind.
    """

    def __init__(self, *things: Callable[[], object]) -> None:
        self._things, self._is_given_up = things, False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._do, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._is_given_up = True
            self._thread.join(LAST_RESORT_S)
            return

        self._thread.join()
        if self._error is not None:
            raise self._error

    def _do(self) -> None:
        """Do all things, until one fails or the block has failed."""
        for thing in self._things:
            if self._is_given_up:
                return
            try:
                thing()
            except Exception as error:
                self._error = error
                return


def try_import(module: str) -> None:
    """Import a module if that works.

    An import that fails does so again, and is reported, where the module is needed.
    """
    with suppress(Exception):
        importlib.import_module(module)


@contextmanager
def limit_wait(limit_s: float, failure: str) -> Iterator[None]:
    """Raise `GaveUp` in the block after `limit_s` seconds.

    Code that heeds no signal for another 10 s, such as Ray's in C++, is ended with the process: with the line `failure`
    on stderr and exit code 2. Works in the main thread; in any other, the block has no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise GaveUp

    last_resort = threading.Timer(limit_s + LAST_RESORT_S, _end_process, [failure])
    last_resort.daemon = True
    handler = signal.signal(signal.SIGALRM, give_up)
    try:
        last_resort.start()
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        last_resort.cancel()


def _end_process(failure: str) -> None:
    """End this process at once, with a line."""
    print_line(failure)
    os._exit(WRONG_REQUEST)
