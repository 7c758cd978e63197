"""The timeline of a start: what took how long, from the birth of a process to the first step of the workers.

Every process notes its own phases, in the time of its machine's clock. Workers post theirs through the board.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

SHORTEST_GAP_S = 0.3
"""A time in which no phase was noted has a row of its own from this length on."""
SHORTEST_PHASE_S = 0.05
"""A phase has a row from this length on."""
GAP = "(nothing noted)"


@dataclass(frozen=True)
class StartPhase:
    """One part of a start. Phases of different processes may overlap."""

    begin_s: float
    end_s: float
    """Seconds as `time.time` counts them."""
    name: str


_noted: list[StartPhase] = []
"""The phases of this process."""


@contextmanager
def timing_phase(name: str) -> Iterator[None]:
    """Note how long the block takes."""
    begin_s = time.time()
    try:
        yield
    finally:
        note_phase(name, begin_s)


def note_phase(name: str, begin_s: float) -> None:
    """Note a phase that ends now."""
    _noted.append(StartPhase(begin_s, time.time(), name))


def note_python() -> None:
    """Note the phase from the birth of this process to now, in which Python started."""
    note_phase("Python and the command line start", read_birth_s())


def take_phases() -> list[StartPhase]:
    """Return what this process has noted since the last call."""
    taken = list(_noted)
    _noted.clear()
    return taken


def read_birth_s() -> float:
    """Return when this process was born."""
    import psutil

    return psutil.Process().create_time()


def list_rows(phases: Sequence[StartPhase], birth_s: float) -> list[tuple[str, str, str]]:
    """List second, name and seconds of each phase in their order, with the gaps between them.

    The seconds of the first column are counted from `birth_s`.
    """
    rows, covered_s = [], birth_s
    for phase in sorted(phases, key=lambda one: (one.begin_s, one.end_s)):
        # What nobody noted is told too, so that the seconds add up.
        if phase.begin_s - covered_s >= SHORTEST_GAP_S:
            rows.append(_format_row(covered_s - birth_s, GAP, phase.begin_s - covered_s))
        if phase.end_s - phase.begin_s >= SHORTEST_PHASE_S:
            rows.append(_format_row(phase.begin_s - birth_s, phase.name, phase.end_s - phase.begin_s))
        covered_s = max(covered_s, phase.end_s)
    return rows


def _format_row(second: float, name: str, seconds: float) -> tuple[str, str, str]:
    return f"{second:.1f}", name, f"{seconds:.1f}"
