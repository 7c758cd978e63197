"""The base of all errors that tell a user what to change."""


class UserError(Exception):
    """A mistake of the user; the message has one line for each mistake, without a traceback."""


def one_line(error: Exception) -> str:
    """Return an error's text as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
