"""The failure of a job, and errors in one line."""

MAX_LINE_CHARACTERS = 300


class JobFailed(Exception):
    """A job ended without its result; the message tells a person why."""


def find_root_cause(traceback: str) -> str:
    """Return the first error of a chain of tracebacks.

    It is the last line of the first traceback. The later tracebacks tell what followed from it.
    """
    first = traceback.split("\nThe above exception was the direct cause")[0].strip()
    return first.splitlines()[-1]


def get_first_line(error: Exception) -> str:
    """Return the first line of an error's text.

    It has at most 300 characters. An error without text is named by its type.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_LINE_CHARACTERS] if lines else type(error).__name__


def describe_error(error: BaseException) -> str:
    """Return the kind of an error and the first line of its text: `OSError: [Errno 28] No space left on device`."""
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    return f"{kind}: {lines[0][:MAX_LINE_CHARACTERS]}" if lines else kind
