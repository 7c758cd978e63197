"""Tables as plain text: the one place that aligns columns."""

import io
from collections.abc import Collection, Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

GAP = "  "
WIDEST = 10_000
"""Characters of a line that rich may fill: nothing is wrapped or cut."""


def format_table(
    rows: Sequence[Sequence[object]],
    header: Sequence[str] = (),
    right: Collection[int] = (),
    indent: str = "",
    first_width: int = 0,
) -> str:
    """Return rows as lines of aligned columns.

    A header, where one is given, is the first line. `right` are the numbers of the columns that stand flush right,
    such as those of figures. The first column is at least `first_width` wide, so that several tables have their second
    one at the same place. All rows have the same number of cells. Lines have no trailing blanks, and the text no
    trailing newline.
    """
    # A table without lines or frame, its columns GAP apart.
    table = Table(box=None, show_header=bool(header), show_edge=False, pad_edge=False, padding=(0, len(GAP), 0, 0))

    number_of_columns = len(header) if header else max(map(len, rows), default=0)
    for number in range(number_of_columns):
        # Text, not markup: brackets in a file's name are not a style.
        title = Text(header[number]) if header else ""
        justify: JustifyMethod = "right" if number in right else "left"
        table.add_column(title, justify=justify, no_wrap=True, min_width=0 if number else first_width)

    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))

    # Without colours, and wide enough for any line; rich pads the last column.
    output = io.StringIO()
    Console(file=output, width=WIDEST, color_system=None, legacy_windows=False).print(table)
    return "\n".join(f"{indent}{line}".rstrip() for line in output.getvalue().splitlines())
