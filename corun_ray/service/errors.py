"""The failure of a job, and the errors of libraries in one line that keeps their reason."""

import re

from corun_ray.service.proxies import describe_proxy

MAX_LINE_CHARACTERS = 600
"""Longer reasons are pages and dumps."""
CAUSED_BY = "\nThe above exception was the direct cause"
NOISE = ("[SQL:", "[parameters:", "(Background on this error at:", "Compile with `TORCH_USE_CUDA_DSA`")
"""How lines of libraries begin that no user can use."""
TRACEBACK = "Traceback (most recent call last)"
FRAME = '  File "'
HEADING = "Traceback"
INDENT = "  "
SENTENCE_ENDS = (".", ":", ";", ",", "!", "?")

# The package of an error's class, as in `ray.exceptions.RpcError: …`; the class itself says something. Names of files,
# such as `view.JPG: …`, look much the same.
_PACKAGE = re.compile(
    r"(?:^|(?<=[\s(]))(?:[A-Za-z_]\w*\.)+(?=[A-Z]\w*(?:Error|Exception|Failed|Timeout|Died|Exit|Interrupt)\b)"
    r"|\bcorun_ray\.(?:\w+\.)+(?=[A-Z])"
)
_CLASS = re.compile(r"^(?:[A-Za-z_]\w*\.)+(?=[A-Z]\w*(?::|\s|$))")
"""The package of the class with which the end of a traceback begins, whatever its name."""
_OBJECT = re.compile(r"<[\w.]+(?: object)? at 0x[0-9a-f]+>(?:: )?|<[\w.]+\([^<>]*\) at 0x[0-9a-f]+>(?:: )?")
_HTML = re.compile(r"""['"]?<(?:!doctype|html)\b.*""", re.IGNORECASE | re.DOTALL)


class JobFailed(Exception):
    """A job ended without its result; the message tells a person why."""


def find_root_cause(traceback: str) -> str:
    """Return the first error of a chain of tracebacks, `Class: reason`, as one line.

    The later tracebacks tell what followed from it. The reason is kept whole, however many lines it has.
    """
    lines = traceback.split(CAUSED_BY)[0].strip().splitlines()

    # The error comes after the heading and the last frame, which is its place and some lines of code.
    begin = max((i + 1 for i, line in enumerate(lines) if line.startswith((FRAME, HEADING))), default=0)
    while 0 < begin < len(lines) - 1 and lines[begin].startswith(INDENT):
        begin += 1
    error = "\n".join(lines[begin:])
    return join_lines(_CLASS.sub("", error) if begin else error)


def format_reason(error: BaseException, url: str = "") -> str:
    """Return why something failed, as one line of at most 600 characters.

    Libraries spread a reason over lines: versions, remedies. All of them are kept, without class paths, tracebacks, SQL
    and web pages. An error that only says that something failed is told with what it was raised from. An error without
    text is named by its type. `url` is the server that was asked, if any: a proxy on the way to it is named.
    """
    reasons = [join_lines(str(error)) or type(error).__name__]
    cause = error.__cause__
    while cause is not None:
        reason = join_lines(str(cause)) or type(cause).__name__
        if not any(reason in earlier for earlier in reasons):
            reasons.append(reason)
        cause = cause.__cause__
    return _cut(": ".join(reason.rstrip(".: ") for reason in reasons)) + describe_proxy(url)


def describe_error(error: BaseException) -> str:
    """Return the kind of an error and its reason: `OSError: [Errno 28] No space left on device`."""
    kind, reason = type(error).__name__, format_reason(error)
    return kind if reason == kind else f"{kind}: {reason}"


def join_lines(text: str) -> str:
    """Return a library's message of several lines as one.

    A line that ends a sentence, or announces the next, is followed by a blank; any other by a comma. Of a traceback,
    only the error is kept.
    """
    if f"\n{FRAME}" in text:
        before, mark, _ = text.partition(TRACEBACK)
        text = f"{before if mark else ''}\n{find_root_cause(text)}"

    # A server's page says less than the status before it.
    text = _HTML.sub("(a web page)", text)

    joined = ""
    for line in text.splitlines():
        words = " ".join(line.split())
        if not words or words.startswith(NOISE):
            continue
        if joined:
            joined += " " if joined.endswith(SENTENCE_ENDS) else ", "
        joined += words
    return _cut(_PACKAGE.sub("", _OBJECT.sub("", joined)))


def _cut(line: str) -> str:
    """Shorten a line that is too long, at a word, and show that it goes on."""
    if len(line) <= MAX_LINE_CHARACTERS:
        return line
    return f"{line[:MAX_LINE_CHARACTERS].rpartition(' ')[0]} …"
