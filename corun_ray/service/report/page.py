"""One self-contained HTML page about a run: no network, no files beside it, readable on a phone."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup

REPORT_FILE = "report.html"
PNG_START = b"\x89PNG"


@dataclass(frozen=True)
class Table:
    """Rows of text cells below a heading for each column."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "table"


@dataclass(frozen=True)
class Charts:
    """SVG elements, side by side where there is room."""

    svgs: Sequence[str]
    kind: str = "charts"


@dataclass(frozen=True)
class Slider:
    """An image before restoration, and after it at several steps; the reader drags the border between the two."""

    name: str
    before: bytes
    after: Sequence[tuple[str, bytes]]
    """Label and JPEG of each step, of the same size as `before`."""
    kind: str = "slider"


@dataclass(frozen=True)
class PictureItem:
    """PNGs or JPEGs with captions."""

    pictures: Sequence[tuple[str, bytes]]
    is_wide: bool = False
    """Whether each needs the width of a large column."""
    kind: str = "pictures"


@dataclass(frozen=True)
class Listing:
    """Text with its own line breaks."""

    text: str
    kind: str = "listing"


@dataclass(frozen=True)
class PageSection:
    """A heading, a line of explanation, and items."""

    heading: str
    note: str
    items: Sequence[Table | Charts | Slider | PictureItem | Listing]


def render(title: str, summary: str, sections: Sequence[PageSection]) -> bytes:
    """Render the page, without the sections that have no items."""
    shown = [section for section in sections if section.items]
    return _load_template().render(title=title, summary=summary, sections=shown).encode()


@cache
def _load_template() -> Template:
    """Load the page's template, once a process."""
    # Everything is escaped but the charts, which are SVG elements already.
    environment = Environment(loader=PackageLoader("corun_ray.service.report", "."), autoescape=True, trim_blocks=True)
    environment.filters["data_uri"] = _encode_data_uri
    environment.filters["svg"] = Markup
    return environment.get_template("page.html.j2")


def _encode_data_uri(picture: bytes) -> str:
    """Encode a PNG or JPEG as a data URI."""
    kind = "png" if picture.startswith(PNG_START) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
