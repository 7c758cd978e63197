"""Line charts as SVG text: small enough for many on a page, large enough to read on a phone.

matplotlib takes half a second to import, and is first needed when a training has ended.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence

MAX_POINTS = 400
"""Points of a line that are drawn."""
FEW_POINTS = 20
"""A line of fewer points has a marker at each."""
SIZE_INCH = (4.2, 2.7)

Points = Sequence[tuple[float, float]]


def draw_line_chart(title: str, lines: Mapping[str, Points], x_label: str = "step") -> str:
    """Draw an `<svg>` element with one line for each name that has points."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and the ids in the file follow from the title: the same chart gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=SIZE_INCH, layout="constrained")
        axes = figure.subplots()

        # One line a name, thinned to at most `MAX_POINTS`.
        for name, points in lines.items():
            stride = max(1, math.ceil(len(points) / MAX_POINTS))
            thinned = points[::stride]
            marker = "." if len(thinned) < FEW_POINTS else None
            axes.plot(*zip(*thinned, strict=True), label=name, linewidth=1.4, marker=marker)

        axes.set(title=title, xlabel=x_label)
        axes.grid(True, alpha=0.25)
        if len(lines) > 1:
            axes.legend(frameon=False)

        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _extract_svg(text.getvalue())


def _extract_svg(document: str) -> str:
    """Extract the `<svg>` element of an SVG file, without its size."""
    _, _, rest = document.partition("<svg")
    attributes, _, drawing = rest.partition(">")
    attributes = re.sub(r' (?:width|height)="[^"]*"', "", attributes)  # The page sets the width.
    return f"<svg{attributes}>{drawing}"
