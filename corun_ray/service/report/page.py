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
    """Cells as text, a heading above each column."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "table"


@dataclass(frozen=True)
class Charts:
    """SVG elements, side by side as far as there is room."""

    svgs: Sequence[str]
    kind: str = "charts"


@dataclass(frozen=True)
class Slider:
    """An image before, and after each of several steps; one is drawn over the other as far as the reader likes."""

    name: str
    before: bytes
    after: Sequence[tuple[str, bytes]]
    """Label and JPEG, of the same size as `before`."""
    kind: str = "slider"


@dataclass(frozen=True)
class PictureItem:
    """PNGs or JPEGs with captions."""

    pictures: Sequence[tuple[str, bytes]]
    is_wide: bool = False
    """Whether they need room to be read."""
    kind: str = "pictures"


@dataclass(frozen=True)
class Listing:
    """Text as it is."""

    text: str
    kind: str = "listing"


@dataclass(frozen=True)
class PageSection:
    """A heading, a line about what is below it, and that."""

    heading: str
    note: str
    items: Sequence[Table | Charts | Slider | PictureItem | Listing]


def render(title: str, summary: str, sections: Sequence[PageSection]) -> bytes:
    """The page; sections without items are left out."""
    shown = [section for section in sections if section.items]
    return _template().render(title=title, summary=summary, sections=shown).encode()


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader("corun_ray.service.report", "."), autoescape=True, trim_blocks=True)
    environment.filters["data_uri"] = _data_uri
    environment.filters["svg"] = Markup
    return environment.get_template("page.html.j2")


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(PNG_START) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
