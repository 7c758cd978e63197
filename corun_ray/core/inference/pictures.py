"""Pictures for people: labelled grids of images, transmissions and maps."""

from collections.abc import Iterable, Mapping, Sequence

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
BACKGROUND = 250
INK = (40, 40, 40)
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
THUMBNAIL_QUALITY = 85
ERROR_GAIN = 4
"""What a re-hazed image still gets wrong is small: a quarter of the range has the brightest colour."""


def apply_colour_map(values: NDArray[np.floating]) -> ImageU8:
    """H W in [0, 1] → H W 3: dark violet is 0, yellow is 1."""
    levels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def draw_grid(rows: Sequence[Mapping[str, ImageU8 | None]], cell_px: int = 192, labels: Sequence[str] = ()) -> ImageU8:
    """One line of pictures a row, one column a name (as in the first row), its name above it.

    Pictures keep their shape, their longer side at `cell_px`; None leaves the cell empty. `labels`, one a row, stand
    to the left of their rows.
    """
    names = list(rows[0])
    fitted = [[_fit(row[name], cell_px) for name in names] for row in rows]
    heights = [max((picture.shape[0] for picture in line if picture is not None), default=0) for line in fitted]
    margin = GAP_PX + max((_text_width(label) + GAP_PX for label in labels), default=0)
    width = margin + len(names) * (cell_px + GAP_PX)
    canvas = np.full((HEADING_PX + sum(heights) + GAP_PX * len(rows), width, 3), BACKGROUND, np.uint8)
    tops = [HEADING_PX + sum(heights[:row]) + GAP_PX * row for row in range(len(rows))]
    for label, top in zip(labels, tops, strict=bool(labels)):
        _write(canvas, label, GAP_PX, top + HEADING_PX - 7)
    for column, name in enumerate(names):
        left = margin + column * (cell_px + GAP_PX)
        _write(canvas, name, left, HEADING_PX - 7)
        for line, top in zip(fitted, tops, strict=True):
            picture = line[column]
            if picture is not None:
                inset = left + (cell_px - picture.shape[1]) // 2
                canvas[top : top + picture.shape[0], inset : inset + picture.shape[1]] = picture
    return canvas


def encode_thumbnail(picture: ImageU8, longest_px: int) -> bytes:
    """A JPEG of the picture, its longer side at most `longest_px`."""
    if max(picture.shape[:2]) > longest_px:
        fitted = _fit(picture, longest_px)
        assert fitted is not None
        picture = fitted
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, THUMBNAIL_QUALITY])[1].tobytes()


def build_stage_rows(restorations: Iterable[Restoration], hazy: Tensor) -> dict[str, dict[str, ImageU8 | None]]:
    """The rows of a grid by their labels: the hazy image, then what every stage made of it.

    `hazy` 1 3 H W in [0, 1]; `restorations` of the same size, first stage first. A stage shows its scene, its
    transmission (yellow is clear air), the image that both together explain (`J T + 1 - T`), and how far that is
    from `hazy`: the mean over the channels, `ERROR_GAIN` times as bright. The last three are empty for a network
    without a transmission.
    """
    error_name = f"error x{ERROR_GAIN}"
    rows = {"hazy": {"scene": to_image(hazy), "transmission": None, "re-hazed": None, error_name: None}}
    for number, (scene, transmission) in enumerate(restorations, 1):
        row = rows[str(number)] = dict.fromkeys(rows["hazy"]) | {"scene": to_image(scene)}
        if transmission is not None:
            rehazed = (scene * transmission + 1 - transmission).clamp(0, 1)
            error = (rehazed - hazy).abs().mean(1)[0]
            row["transmission"] = apply_colour_map(transmission[0, 0].cpu().numpy())
            row["re-hazed"], row[error_name] = to_image(rehazed), apply_colour_map(ERROR_GAIN * error.cpu().numpy())
    return rows


def _write(canvas: ImageU8, text: str, left: int, baseline: int) -> None:
    cv2.putText(canvas, text, (left, baseline), FONT, FONT_SCALE, INK, 1, cv2.LINE_AA)


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, FONT, FONT_SCALE, 1)[0][0]


def _fit(picture: ImageU8 | None, cell_px: int) -> ImageU8 | None:
    if picture is None:
        return None
    scale = cell_px / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return resize(picture, height, width)


PictureRow = dict[str, ImageU8 | None]
