"""The failure of a job, and how errors are told in a line."""


class JobFailed(Exception):
    """The job ended without its result; the message says why, for a person."""


def root_cause(traceback: str) -> str:
    """The first error of a chain of tracebacks, in a line: what happened, without what followed from it."""
    first = traceback.split("\nThe above exception was the direct cause")[0].strip()
    return first.splitlines()[-1]


def first_line(error: Exception) -> str:
    """What an error says, at most 300 characters of its first line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
