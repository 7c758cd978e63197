"""Pictures for people: labelled grids of images, transmissions and maps."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.augment import resize

ImageU8 = NDArray[np.uint8]

GAP_PX = 4
HEADING_PX = 22
BACKGROUND = 250
INK = (40, 40, 40)


def colour_map(values: NDArray[np.floating]) -> ImageU8:
    """H W in [0, 1] → H W 3: dark violet is 0, yellow is 1."""
    levels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def grid(rows: Sequence[Mapping[str, ImageU8 | None]], cell_px: int = 192) -> ImageU8:
    """One line of pictures a row, one column a name (as in the first row), its name above it.

    Pictures keep their shape, their longer side at `cell_px`; None leaves the cell empty.
    """
    names = list(rows[0])
    fitted = [[_fit(row[name], cell_px) for name in names] for row in rows]
    heights = [max((picture.shape[0] for picture in line if picture is not None), default=0) for line in fitted]
    width = GAP_PX + len(names) * (cell_px + GAP_PX)
    canvas = np.full((HEADING_PX + sum(heights) + GAP_PX * len(rows), width, 3), BACKGROUND, np.uint8)
    for column, name in enumerate(names):
        left = GAP_PX + column * (cell_px + GAP_PX)
        cv2.putText(canvas, name, (left, HEADING_PX - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1, cv2.LINE_AA)
        top = HEADING_PX
        for line, height in zip(fitted, heights, strict=True):
            picture = line[column]
            if picture is not None:
                inset = left + (cell_px - picture.shape[1]) // 2
                canvas[top : top + picture.shape[0], inset : inset + picture.shape[1]] = picture
            top += height + GAP_PX
    return canvas


def _fit(picture: ImageU8 | None, cell_px: int) -> ImageU8 | None:
    if picture is None:
        return None
    scale = cell_px / max(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return resize(picture, height, width)
