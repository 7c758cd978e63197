"""What may be uploaded to be dehazed, judged before a pixel is decoded; and what is said of the rest.

What an image file says of itself in its header, read without decoding a pixel.

A few bytes can declare an image that fills the memory: so its size is looked at first. Pillow's and tifffile's readers
do that, but for WebP, where Pillow allocates the declared canvas. Layouts: RFC 9649 (WebP), TIFF 6.0."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
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


MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".tif": "image/tiff",
    ".bmp": "image/bmp",
}
"""What is taken, and what a request calls it."""
OTHER_NAMES = {"image/jpg", "image/pjpeg", "image/x-png", "image/x-bmp", "image/x-ms-bmp", "application/octet-stream"}
FORMATS = ("png", "jpg", "webp", "tif")
"""What may be asked for; without asking, the answer has the format of the upload."""
EXPECTED = "expected a JPEG, PNG, WebP, TIFF or BMP file"


class Refusal(Exception):
    """A request that is not served: HTTP's `status`, and the reason in a line for a person."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class UploadLimits:
    """Of an upload."""

    max_upload_mib: int
    max_megapixels: float
    min_side_px: int

    @property
    def max_bytes(self) -> int:
        """The largest body."""
        return self.max_upload_mib * 2**20

    @property
    def max_pixels(self) -> int:
        """Of the largest image."""
        return int(self.max_megapixels * 1e6)


def parse_format(query: Mapping[str, str]) -> str | None:
    """The suffix of the format that the query asks for, None where it does not; raises `Refusal`."""
    if unknown := sorted(query.keys() - {"format"}):
        raise Refusal(400, f"unknown parameter {unknown[0][:40]!r}, expected format or none")
    format = query.get("format")
    if format is not None and format not in FORMATS:
        raise Refusal(400, f"format: {format[:20]!r} is not one of {', '.join(FORMATS)}")
    return format and f".{format}"


def check_headers(headers: Mapping[str, str], limits: UploadLimits) -> None:
    """Refuses by what the request says of its body, before any of it has been read."""
    media_type = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if media_type not in OTHER_NAMES and media_type not in MEDIA_TYPES.values():
        raise Refusal(
            415, f"Content-Type {media_type[:60]!r} is not taken, {EXPECTED} as the body and a type such as image/jpeg"
        )
    if headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "a body with a Content-Encoding is not taken, expected the file as it is")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _too_many_bytes(limits)


async def read_body(chunks: AsyncIterator[bytes], limits: UploadLimits, timeout_s: float) -> bytes:
    """The body, whatever the headers said of its length; raises `Refusal` as soon as it is too long, and when late."""
    parts, length = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in chunks:
                length += len(chunk)
                if length > limits.max_bytes:
                    raise _too_many_bytes(limits)
                parts.append(chunk)
    except TimeoutError:
        raise Refusal(408, f"the upload took more than {timeout_s:g} s") from None
    return b"".join(parts)


def _too_many_bytes(limits: UploadLimits) -> Refusal:
    return Refusal(413, f"the file is larger than {limits.max_upload_mib} MiB")


def check_image(data: bytes, limits: UploadLimits) -> ImageHeader:
    """What the file says of its image, which may be decoded then; raises `Refusal`."""
    if not data:
        raise Refusal(400, f"empty, {EXPECTED}")
    header = read_header(data)
    if header is None:
        raise Refusal(400, f"not an image, or a damaged one, {EXPECTED}")
    size = f"{header.width_px} x {header.height_px} px"
    if min(header.width_px, header.height_px) < limits.min_side_px:
        raise Refusal(422, f"{size} is too small, expected {limits.min_side_px} px a side at least")
    if header.width_px * header.height_px > limits.max_pixels:
        raise Refusal(422, f"{size} is too large, expected at most {limits.max_megapixels:g} megapixels")
    if header.has_floats:
        raise Refusal(400, "its pixels are floating-point numbers, expected 8 or 16 bit integers")
    if header.has_frames:
        raise Refusal(422, "it has several frames or pages, expected one image")
    if header.work_px > limits.max_pixels:
        raise Refusal(422, f"a file of this structure takes too much work to decode ({size})")
    return header
