"""What a person sees of a job: a header, one live line of progress, a footer. Plain lines where no terminal is."""

import sys
import time
from collections.abc import Mapping, Sequence

LINE_EVERY_S = 15.0
"""Between two progress lines where the output is no terminal (a job's log)."""
RATE_SPAN_S = 30.0
FEW_MARKS = 5
LABEL_WIDTH = 9


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Rate:
    """Items per second over the last half minute: what an ETA should rest on."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def update(self, done: int) -> float | None:
        """The rate now that `done` items are done; None before there is one."""
        now = time.monotonic()
        fresh = [(at, n) for at, n in self._marks if now - at < RATE_SPAN_S]
        # Slow work may take longer than the span: then the last few marks have to do.
        known = [(at, n) for at, n in max(fresh, self._marks[-FEW_MARKS:], key=len) if n <= done]
        if not known or known[-1][1] < done:
            known.append((now, done))
        self._marks = known
        first_at, first = self._marks[0]
        return (done - first) / (now - first_at) if done > first else None


class Console:
    """The job's output on stdout."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._last_line_s = 0.0
        self._last_done = -1
        self._live = ""
        self._rate = Rate()

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """A title and what the job found and will use, a line each."""
        self._rate, self._last_done, self._last_line_s = Rate(), -1, time.monotonic()
        self.say(f"\n{title}")
        for label, text in facts.items():
            self.say(f"  {label:<{LABEL_WIDTH}} {text}")

    def progress(self, done: int, total: int, what: str, details: Sequence[str] = ()) -> None:
        """The live line: how far, how fast, how long still."""
        rate = self._rate.update(done)
        parts = [f"{what} {done}/{total}"]
        if rate:
            parts += [f"{rate:.2f}/s", f"ETA {duration((total - done) / rate)}"]
        line = "  " + "  ".join([*parts, *details])
        now = time.monotonic()
        if self._is_terminal:
            print(f"\r{line:<{len(self._live)}}", end="", flush=True)
            self._live = line
        elif done != self._last_done and (now - self._last_line_s >= LINE_EVERY_S or done == total):
            print(line, flush=True)
            self._last_done, self._last_line_s = done, now

    def say(self, text: str) -> None:
        """Lines of their own."""
        if self._is_terminal and self._live:
            print()
            self._live = ""
        print(text, flush=True)

    def footer(self, title: str, facts: Mapping[str, str], next_commands: Sequence[str] = ()) -> None:
        """The result, and what one would do next."""
        self.say(f"  {title}")
        for label, text in facts.items():
            self.say(f"  {label:<{LABEL_WIDTH}} {text}")
        for command in next_commands:
            self.say(f"  {'next':<{LABEL_WIDTH}} {command}")
