"""The timeline of a start."""

from corun_ray.service.start_times import (
    GAP,
    StartPhase,
    list_rows,
    note_phase,
    read_birth_s,
    take_phases,
    timing_phase,
)
from corun_ray.service.telemetry.console import Console

PHASES = [
    StartPhase(1005.0, 1009.0, "Ray starts"),
    StartPhase(1000.0, 1001.5, "Python starts"),
    StartPhase(1001.5, 1001.52, "job file"),
    StartPhase(1006.0, 1007.0, "meanwhile"),
    StartPhase(1009.1, 1012.0, "worker"),
]


def test_rows_follow_the_clock_and_name_the_gaps():
    assert list_rows(PHASES, 1000.0) == [
        ("0.0", "Python starts", "1.5"),
        ("1.5", GAP, "3.5"),
        ("5.0", "Ray starts", "4.0"),
        ("6.0", "meanwhile", "1.0"),
        ("9.1", "worker", "2.9"),
    ], "in the order of their beginnings, without the phase of 20 ms; a gap of 0.1 s is none"


def test_a_phase_is_noted_once_also_where_it_fails():
    take_phases()
    try:
        with timing_phase("fails"):
            raise ValueError
    except ValueError:
        pass
    note_phase("since the birth", read_birth_s())
    fails, birth = take_phases()
    assert (fails.name, birth.name) == ("fails", "since the birth")
    assert fails.begin_s <= fails.end_s and birth.begin_s < fails.begin_s
    assert take_phases() == []


def test_the_timeline_is_shown_once_and_only_where_it_was_asked_for(capsys):
    Console().show_start(PHASES)
    assert capsys.readouterr().out == ""

    console = Console(shows_start=True)
    console.show_start(PHASES)
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first.strip() == "the start, to the end of the first step:"
    assert header.split() == ["second", "phase", "seconds"]
    assert any("worker" in row and row.endswith("2.9") for row in rows)
    console.show_start(PHASES)
    assert capsys.readouterr().out == ""
