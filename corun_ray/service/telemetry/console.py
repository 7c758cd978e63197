"""Shows a person a job: a header, progress, a footer.

Progress is one live line on a terminal, elsewhere a plain line now and then.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from corun_ray.service.start_times import StartPhase, list_rows, read_birth_s, take_phases
from corun_ray.service.telemetry.tables import format_table

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY_S = 15.0
"""Between two progress lines where the output is no terminal (a job's log)."""
DRAW_EVERY_S = 0.1
"""Between two drawings of the live line."""
BAR_CHARACTERS = 10
RATE_SPAN_S = 30.0
"""Over which a rate is taken."""
FEW_MARKS = 5
"""Counts that a rate rests on where they are older than its span."""
INDENT = "  "
LABEL_WIDTH = 9
"""Of the labels of facts: header and footer have the facts themselves in one column."""


def format_duration(seconds: float) -> str:
    """Return seconds as `1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Rate:
    """Items per second over the last half minute, for the ETA.

    rich estimates over half a minute, too, but has no rate where a single item takes longer, such as a training step
    on CPUs or a photograph in tiles. The log's lines need a rate without a terminal, besides.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def update(self, done: int) -> float | None:
        """Return the rate now that `done` items are done, if any."""
        now = time.monotonic()
        fresh = [(at, n) for at, n in self._marks if now - at < RATE_SPAN_S]

        # Slow work may take longer than the span: then the last few marks have to do.
        marks = max(fresh, self._marks[-FEW_MARKS:], key=len)
        # Marks above `done` are of work that is done again.
        known = [(at, n) for at, n in marks if n <= done]
        if not known or known[-1][1] < done:
            known.append((now, done))
        self._marks = known

        first_at, first = known[0]
        return (done - first) / (now - first_at) if done > first else None


class Console:
    """The job's output on stdout; leaving it ends the live line.

    With `shows_start`, it also shows the timeline from the birth of this process to the first step of the workers.
    """

    def __init__(self, shows_start: bool = False) -> None:
        self._shows_start = shows_start
        self._is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._live: Progress | None = None
        self._rate = Rate()
        self._last_line_s = 0.0
        self._last_done = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._end_live_line()

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """Print a title and facts about the job, a line each."""
        # A new job begins: what was measured of the one before is of no use.
        self._end_live_line()
        self._rate, self._last_done, self._last_line_s = Rate(), -1, time.monotonic()

        self.say(f"\n{title}")
        self._say_facts(list(facts.items()))

    def progress(self, done: int, total: int, what: str, details: Sequence[str] = ()) -> None:
        """Show how far the job is, its rate and its ETA."""
        # The text: counts, rate and ETA as soon as there is a rate, then the caller's details.
        rate = self._rate.update(done)
        parts = [f"{what} {done}/{total}"]
        if rate:
            parts += [f"{rate:.2f}/s", f"ETA {format_duration((total - done) / rate)}"]
        parts += details

        # A terminal shows every call, a log a line now and then and the last.
        now = time.monotonic()
        if self._is_terminal:
            self._draw(done, total, INDENT.join(parts), now)
        elif done != self._last_done and (now - self._last_line_s >= LINE_EVERY_S or done == total):
            print(INDENT + INDENT.join(parts), flush=True)
            self._last_done, self._last_line_s = done, now

    def wait(self, text: str, total: int) -> None:
        """Show in the live line what the job waits for before the first of `total` items; a log has no such line."""
        if self._is_terminal:
            self._draw(0, total, text, time.monotonic())

    def say(self, text: str) -> None:
        """Print lines above the live line, which stays."""
        if self._live is not None and self._live.finished:
            self._end_live_line()

        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def show_start(self, phases: Sequence[StartPhase]) -> None:
        """Print the timeline of the start once, where it was asked for; `phases` are those of the other processes."""
        if self._shows_start:
            rows = list_rows([*take_phases(), *phases], read_birth_s())
            table = format_table(rows, ("second", "phase", "seconds"), right=(0, 2), indent=INDENT)
            self.say(f"{INDENT}the start, to the end of the first step:\n{table}")
            self._shows_start = False

    def footer(self, title: str, facts: Mapping[str, str], next_commands: Sequence[str] = ()) -> None:
        """Print the result, and the commands that one would run next."""
        self._end_live_line()
        self.say(f"{INDENT}{title}")
        next_rows = [("next", command) for command in next_commands]
        self._say_facts([*facts.items(), *next_rows])

    def _say_facts(self, rows: Sequence[tuple[str, str]]) -> None:
        if rows:
            self.say(format_table(rows, indent=INDENT, first_width=LABEL_WIDTH))

    def _draw(self, done: int, total: int, text: str, now: float) -> None:
        """Draw the live line, unless it was drawn just now."""
        # Drawing costs a millisecond; calls may come by the thousand.
        if self._live is None:
            self._live = start_live_line()
        elif now - self._last_line_s < DRAW_EVERY_S and done < total:
            return
        (line,) = self._live.task_ids
        self._live.update(line, completed=done, total=total, description=text, refresh=True)
        self._last_line_s = now

    def _end_live_line(self) -> None:
        """Leave the live line as it stands and go below it."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def start_live_line() -> "Progress":
    """Return rich's live line at the bottom of the terminal.

    It is drawn when asked to, not by a thread, and leaves stdout and stderr alone: Ray writes to both.
    """
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    # Green says done; everything else has the terminal's own colour.
    bar = BarColumn(BAR_CHARACTERS, style="dim", complete_style="default", finished_style="green")
    # The text has the rest of the line: too long, it is cut, for a second line would not be overdrawn.
    rest_of_line = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    text = TextColumn("{task.description}", style="default", markup=False, table_column=rest_of_line)

    live = Progress(
        bar,
        text,
        console=Terminal(file=sys.stdout, highlight=False),
        expand=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    live.add_task("")
    live.start()
    return live
