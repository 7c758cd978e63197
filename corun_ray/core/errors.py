"""The base of all errors that tell a user what to change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_ERROR_CHARS = 300


class UserError(Exception):
    """A mistake of the user; the message has one line for each mistake and is shown without a traceback."""


def format_error(error: Exception) -> str:
    """Return an error's text as one line.

    The line has at most 300 characters. An error without a text is named by its class.
    """
    text = " ".join(str(error).split())
    return text[:MAX_ERROR_CHARS] or type(error).__name__


class Stopped(KeyboardInterrupt):
    """A command was stopped by Ctrl-C or SIGTERM; the message tells where its work stands, and how it goes on."""


@contextmanager
def explain_stop(explain: Callable[[], str]) -> Iterator[None]:
    """Let a stop of the block tell where its work stands; an inner block knows better."""
    try:
        yield
    except Stopped:
        raise
    except KeyboardInterrupt:
        raise Stopped(explain()) from None
