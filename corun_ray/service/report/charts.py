"""Line charts as SVG text, small enough to be many on a page and large enough to be read on a phone."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
MAX_POINTS = 400
SIZE_IN = (4.2, 2.7)


def draw_line_chart(title: str, lines: Mapping[str, Points], x_label: str = "step") -> str:
    """An `<svg>` element: one line for each name that has points."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            thin = points[:: -(-len(points) // MAX_POINTS) or 1]
            axes.plot(*zip(*thin, strict=True), label=name, linewidth=1.4, marker="." if len(thin) < 20 else None)
        axes.set(title=title, xlabel=x_label)
        axes.grid(True, alpha=0.25)
        if len(lines) > 1:
            axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    _, _, rest = text.getvalue().partition("<svg")
    head, _, drawing = rest.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)  # the page gives it its width
    return f"<svg{head}>{drawing}"
