"""What an image file says of itself in its header, read without decoding a pixel.

A few bytes can declare an image that fills the memory: so its size is looked at first. Pillow's and tifffile's readers
do that, but for WebP, where Pillow allocates the declared canvas. Layouts: RFC 9649 (WebP), TIFF 6.0.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import tifffile
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin

from corun_ray.service.inference.photos import TIFF_STARTS

JPEG_SCAN = b"\xff\xda"
USUAL_SCANS = 16
"""Of a progressive JPEG; each scan is a pass over the whole image, and a file may hold thousands."""
MAX_SAMPLES, MAX_BITS = 4, 16
IEEE_FLOAT = 3
BITSTREAM, LOSSLESS, EXTENDED = b"VP8 ", b"VP8L", b"VP8X"
ANIMATION_FLAG = 0x02


@dataclass(frozen=True)
class ImageHeader:
    """An image that has not been decoded."""

    suffix: str
    """`.jpg`, `.png`, `.webp`, `.tif` or `.bmp`."""
    width_px: int
    height_px: int
    has_frames: bool = False
    """Several, or several pages."""
    has_floats: bool = False
    work_px: int = 0
    """Pixels that a decoder may have to hold or go through beyond the image's own."""


def read_header(data: bytes) -> ImageHeader | None:
    """The header of a file, by its first bytes; None for anything that is not one of the five formats, or damaged."""
    for start, read in READERS.items():
        if data.startswith(start):
            try:
                return read(data)
            except Exception:  # a reader that trips over a hostile file may do so with any error
                return None
    return None


def _png(data: bytes) -> ImageHeader:
    file = PngImagePlugin.PngImageFile(io.BytesIO(data))
    return ImageHeader(".png", *file.size, has_frames=getattr(file, "n_frames", 1) > 1)


def _jpeg(data: bytes) -> ImageHeader:
    width, height = JpegImagePlugin.JpegImageFile(io.BytesIO(data)).size
    # Entropy-coded data have no such pair of bytes, so that these are the scans, and perhaps a thumbnail's.
    scans = data.count(JPEG_SCAN)
    return ImageHeader(".jpg", width, height, work_px=width * height * scans // USUAL_SCANS)


def _bmp(data: bytes) -> ImageHeader:
    return ImageHeader(".bmp", *BmpImagePlugin.BmpImageFile(io.BytesIO(data)).size)


def _webp(data: bytes) -> ImageHeader | None:
    kind, body = data[12:16], data[20:]
    if data[8:12] != b"WEBP" or len(body) < 10:
        return None
    if kind == EXTENDED:
        width, height = (1 + int.from_bytes(body[at : at + 3], "little") for at in (4, 7))
        return ImageHeader(".webp", width, height, has_frames=bool(body[0] & ANIMATION_FLAG))
    if kind == LOSSLESS:
        bits = int.from_bytes(body[1:5], "little")
        return ImageHeader(".webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == BITSTREAM:
        width, height = (int.from_bytes(body[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        return ImageHeader(".webp", width, height)
    return None


def _tiff(data: bytes) -> ImageHeader | None:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        has_floats = page.sampleformat == IEEE_FLOAT
        if page.samplesperpixel > MAX_SAMPLES or (page.bitspersample > MAX_BITS and not has_floats):
            return None
        tile_px = page.tilewidth * page.tilelength
        return ImageHeader(".tif", page.imagewidth, page.imagelength, len(file.pages) > 1, has_floats, tile_px)


READERS: dict[bytes, Callable[[bytes], ImageHeader | None]] = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"BM": _bmp,
    b"RIFF": _webp,
    **dict.fromkeys(TIFF_STARTS, _tiff),
}
