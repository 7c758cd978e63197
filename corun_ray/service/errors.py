"""The failure of a job, and errors in one line."""

import re

MAX_LINE_CHARACTERS = 300

FRAME = '  File "'
"""How a frame of a traceback begins."""
CLASS_PATH = re.compile(r"^(\w+\.)+(?=\w+(:|$))")
"""The modules before the name of an error's class."""


class JobFailed(Exception):
    """A job ended without its result; the message tells a person why."""


def find_root_cause(traceback: str) -> str:
    """Return the first error of a chain of tracebacks, on one line and without the path of its class.

    Its text ends the first traceback. The later tracebacks tell what followed from it.
    """
    lines = traceback.split("\nThe above exception was the direct cause")[0].strip().splitlines()

    # The text begins at the first line that is not indented below the last frame; it may have several lines.
    text = lines[-1:]
    frames = [place for place, line in enumerate(lines) if line.startswith(FRAME)]
    for place in range(frames[-1] if frames else len(lines), len(lines)):
        if lines[place] and not lines[place].startswith(" "):
            text = lines[place:]
            break
    return CLASS_PATH.sub("", " ".join(" ".join(text).split()))


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
