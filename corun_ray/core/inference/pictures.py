"""Pictures for people: labelled grids of images, transmissions and maps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from corun_ray.core.data.augment import resize
from corun_ray.core.data.images import ImageU8
from corun_ray.core.inference.restore import to_image
from corun_ray.core.networks.corun import Restoration

GAP_PX = 4
HEADING_PX = 22
# From the lower edge of a heading to the baseline of its text.
BASELINE_PX = 7
BACKGROUND = 250
INK = (40, 40, 40)
FONT = cv2.FONT_HERSHEY_SIMPLEX
FONT_SCALE = 0.45
THUMBNAIL_QUALITY = 85
ERROR_GAIN = 4
"""Factor of shown re-hazing errors, which are small: a quarter of the range has the brightest colour."""

BOX_FONT_SCALE = 0.4
TRUE_BOX_COLOUR = (60, 200, 90)
FOUND_BOX_COLOUR = (255, 140, 30)

PictureRow = dict[str, ImageU8 | None]
"""Column name → picture; None leaves the cell empty."""


def apply_colour_map(values: NDArray[np.floating]) -> ImageU8:
    """Colour values in [0, 1]: dark violet to yellow.

    H W → H W 3.
    """
    levels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def draw_grid(rows: Sequence[Mapping[str, ImageU8 | None]], cell_px: int = 192, labels: Sequence[str] = ()) -> ImageU8:
    """Draw a grid of pictures, headings above the columns.

    The names of the first row are the columns. Pictures keep their shape, with the longer side at `cell_px`; None
    leaves the cell empty. `labels`, one for each row, are written to the left of the rows.
    """
    names = list(rows[0])
    lines = [[_fit(row[name], cell_px) for name in names] for row in rows]

    # The tallest picture of a line decides where the next line begins.
    tops = []
    top = HEADING_PX
    for line in lines:
        tops.append(top)
        heights = [picture.shape[0] for picture in line if picture is not None]
        top += max(heights, default=0) + GAP_PX

    # The widest label decides where the first column begins.
    label_widths = [_measure_text_px(label) + GAP_PX for label in labels]
    margin = GAP_PX + max(label_widths, default=0)
    canvas = np.full((top, margin + len(names) * (cell_px + GAP_PX), 3), BACKGROUND, np.uint8)

    for label, top in zip(labels, tops, strict=bool(labels)):
        _write(canvas, label, GAP_PX, top + HEADING_PX - BASELINE_PX)
    for column, name in enumerate(names):
        left = margin + column * (cell_px + GAP_PX)
        _write(canvas, name, left, HEADING_PX - BASELINE_PX)
        for line, top in zip(lines, tops, strict=True):
            _paste(canvas, line[column], left, top, cell_px)
    return canvas


class DrawnBox(NamedTuple):
    """A box to draw into a picture, with a text above it."""

    corners: tuple[float, ...]
    """Left, top, right, bottom in pixels of the picture."""
    text: str
    is_true: bool
    """Whether the box is a true one, drawn in green without its text, or one that was found."""


def draw_boxes(picture: ImageU8, boxes: Sequence[DrawnBox], longer_px: int) -> ImageU8:
    """Draw boxes into a resized copy of a picture.

    Its longer side has `longer_px`. Later boxes lie on earlier ones.
    """
    canvas = np.ascontiguousarray(_resize_longer_side(picture, longer_px))
    scale_x = canvas.shape[1] / picture.shape[1]
    scale_y = canvas.shape[0] / picture.shape[0]
    for box in boxes:
        left, top, right, bottom = box.corners
        start = round(left * scale_x), round(top * scale_y)
        end = round(right * scale_x) - 1, round(bottom * scale_y) - 1
        if box.is_true:
            cv2.rectangle(canvas, start, end, TRUE_BOX_COLOUR, 2)
            continue
        cv2.rectangle(canvas, start, end, FOUND_BOX_COLOUR, 1)
        _write_tag(canvas, box.text, start)
    return canvas


def _write_tag(canvas: ImageU8, text: str, corner: tuple[int, int]) -> None:
    """Write a text on a filled ground, above a box's upper left corner.

    At the picture's upper edge the text is within the box.
    """
    (width, height), below = cv2.getTextSize(text, FONT, BOX_FONT_SCALE, 1)
    left = max(0, min(corner[0], canvas.shape[1] - width))
    top = max(0, corner[1] - height - below)
    cv2.rectangle(canvas, (left, top), (left + width, top + height + below), FOUND_BOX_COLOUR, cv2.FILLED)
    cv2.putText(canvas, text, (left, top + height), FONT, BOX_FONT_SCALE, INK, 1, cv2.LINE_AA)


def encode_thumbnail(picture: ImageU8, longest_px: int) -> bytes:
    """Encode a picture as a small JPEG.

    Its longer side is at most `longest_px`.
    """
    if max(picture.shape[:2]) > longest_px:
        picture = _resize_longer_side(picture, longest_px)
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, THUMBNAIL_QUALITY])[1].tobytes()


def build_stage_rows(restorations: Iterable[Restoration], hazy: Tensor) -> dict[str, PictureRow]:
    """Build one grid row for each stage.

    Returns rows by their labels; the hazy image comes first. `hazy` is 1 3 H W in [0, 1]; `restorations` have the same
    size, first stage first. A stage shows its scene, its transmission (yellow is clear air), the re-hazed image that
    both together explain (`J T + 1 - T`), and its error: the distance to `hazy`, as the mean over the channels,
    `ERROR_GAIN` times as bright. The last three cells are empty for a network without a transmission.
    """
    error_name = f"error x{ERROR_GAIN}"
    columns = ("scene", "transmission", "re-hazed", error_name)

    first: PictureRow = dict.fromkeys(columns)
    first["scene"] = to_image(hazy)
    rows = {"hazy": first}

    for number, (scene, transmission) in enumerate(restorations, 1):
        row: PictureRow = dict.fromkeys(columns)
        row["scene"] = to_image(scene)
        if transmission is not None:
            rehazed = (scene * transmission + 1 - transmission).clamp(0, 1)
            error = (rehazed - hazy).abs().mean(1)[0]
            row["transmission"] = apply_colour_map(transmission[0, 0].cpu().numpy())
            row["re-hazed"] = to_image(rehazed)
            row[error_name] = apply_colour_map(ERROR_GAIN * error.cpu().numpy())
        rows[str(number)] = row
    return rows


def _paste(canvas: ImageU8, picture: ImageU8 | None, left: int, top: int, cell_px: int) -> None:
    """Paste a picture into its cell, horizontally centred.

    None pastes nothing.
    """
    if picture is None:
        return
    height, width = picture.shape[:2]
    inset = left + (cell_px - width) // 2
    canvas[top : top + height, inset : inset + width] = picture


def _write(canvas: ImageU8, text: str, left: int, baseline: int) -> None:
    """Write a line of text onto the canvas."""
    cv2.putText(canvas, text, (left, baseline), FONT, FONT_SCALE, INK, 1, cv2.LINE_AA)


def _measure_text_px(text: str) -> int:
    """Return the width of a line of text in pixels."""
    return cv2.getTextSize(text, FONT, FONT_SCALE, 1)[0][0]


def _fit(picture: ImageU8 | None, cell_px: int) -> ImageU8 | None:
    """Resize a picture to fill a cell; None stays None."""
    return None if picture is None else _resize_longer_side(picture, cell_px)


def _resize_longer_side(picture: ImageU8, longer_px: int) -> ImageU8:
    """Resize a picture so that its longer side has `longer_px`."""
    scale = longer_px / max(picture.shape[:2])
    height = max(1, round(picture.shape[0] * scale))
    width = max(1, round(picture.shape[1] * scale))
    return resize(picture, height, width)
