from corun_ray.service.telemetry.tables import format_table


def test_columns_are_aligned_below_their_header() -> None:
    text = format_table([("a.pt", 12.5), ("longer.pt", 3)], ("file", "MB"), right={1}, indent="  ")
    assert text == "  file         MB\n  a.pt       12.5\n  longer.pt     3"


def test_without_a_header_there_are_rows_alone() -> None:
    assert format_table([("name", "x"), ("longer name", "")]) == "name         x\nlonger name"


def test_brackets_are_text_and_nothing_is_cut() -> None:
    long = "[red]" + "x" * 500
    assert format_table([(long, "[/]")]) == f"{long}  [/]"


def test_nothing_gives_nothing() -> None:
    assert format_table([]) == ""
