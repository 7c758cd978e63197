"""A region of a photograph without the work on what lies below it.

OpenCV decodes JPEG files whole; so does Pillow, but it does not print that coded data are left over, when a file's
header promises fewer rows than there are. Both give the same pixels.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile

from corun_ray.core.data import jpeg
from corun_ray.core.data.images import MIN_SIDE_PX, decode_image

UPRIGHT = 1
CONTEXT_ROWS = 16
MAX_PX = 2**30
"""More OpenCV decodes of no image. A region costs little of any, but what has its image's shape is allocated, too."""


def cuttable_sides(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels of a photograph that `decode_region` saves work on; None: decode it as a whole.

    That is every whole JPEG of three colours of 8 bits which its EXIF orientation does not turn.
    """
    if not jpeg.is_jpeg(data) or not jpeg.has_end(data):
        return None
    try:
        file = JpegImageFile(io.BytesIO(data))
        if file.mode != "RGB" or file.getexif().get(Base.Orientation, UPRIGHT) != UPRIGHT:
            return None
    except Exception:  # a damaged header lets any error of its reader through; who decodes the whole names it
        return None
    sides_px = file.height, file.width
    return sides_px if min(sides_px) >= MIN_SIDE_PX and math.prod(sides_px) <= MAX_PX else None


def decode_region(data: bytes, rows: slice, columns: slice) -> NDArray[np.uint8]:
    """Decodes a region of a photograph with `cuttable_sides` to `h w 3`, RGB uint8: the pixels of `decode_image`.

    Raises `BadImage` as that does, but not for what is damaged below the region.
    """
    try:
        file = JpegImageFile(io.BytesIO(jpeg.shortened(data, rows.stop + CONTEXT_ROWS)))
        return np.asarray(file.crop((columns.start, rows.start, columns.stop, rows.stop)))
    except OSError:  # Pillow gives up on it: OpenCV has the last word, as on every other file
        return decode_image(data)[rows, columns]
