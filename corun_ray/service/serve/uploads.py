"""Which uploads are accepted, judged from a request's headers and an image file's header, without decoding a pixel.

A few bytes can declare an image that fills the memory, so the size is read before anything is decoded. Pillow's and
tifffile's readers do so for all formats but WebP, where Pillow allocates the declared canvas. Layouts: RFC 9649 (WebP),
TIFF 6.0.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import tifffile
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin

from corun_ray.core.data.formats import TIFF_STARTS

# --- What is accepted ---

MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".tif": "image/tiff",
    ".bmp": "image/bmp",
}
"""Accepted formats, by the suffix of their files."""
OTHER_MEDIA_TYPES = frozenset(
    {"image/jpg", "image/pjpeg", "image/x-png", "image/x-bmp", "image/x-ms-bmp", "application/octet-stream"}
)
"""Other names that clients give to the same formats, or to any file."""
FORMATS = ("png", "jpg", "webp", "tif")
"""Formats that a request may ask for; by default the answer has the format of the upload."""
EXPECTED = "expected a JPEG, PNG, WebP, TIFF or BMP file"

# --- The insides of image files ---

JPEG_SCAN = b"\xff\xda"
USUAL_JPEG_SCANS = 16
"""Scans of a progressive JPEG. Each is a pass over the whole image, and a hostile file may hold thousands."""
TIFF_FLOAT = 3
"""The TIFF sample format of floating-point numbers."""
MAX_TIFF_SAMPLES = 4
MAX_TIFF_BITS = 16
WEBP_LOSSY, WEBP_LOSSLESS, WEBP_EXTENDED = b"VP8 ", b"VP8L", b"VP8X"
WEBP_ANIMATION_FLAG = 0x02
WEBP_SIDE_MASK = 0x3FFF
"""Sides of lossy and lossless WebP have 14 bits."""
MIN_WEBP_BYTES = 10
"""Bytes after the chunk header that hold the size in any kind of WebP."""


class Refusal(Exception):
    """A request that is not served: the HTTP status, and a reason of one line for a person."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class UploadLimits:
    """The sizes of uploads that are accepted."""

    max_upload_mib: int
    max_megapixels: float
    min_side_px: int

    @property
    def max_bytes(self) -> int:
        """The largest body."""
        return self.max_upload_mib * 2**20

    @property
    def max_pixels(self) -> int:
        """The pixels of the largest image."""
        return int(self.max_megapixels * 1e6)


@dataclass(frozen=True)
class ImageHeader:
    """What an image file declares, before it is decoded."""

    suffix: str
    """`.jpg`, `.png`, `.webp`, `.tif` or `.bmp`."""
    width_px: int
    height_px: int
    has_frames: bool = False
    """Whether the file has several frames or pages."""
    has_floats: bool = False
    """Whether pixels are floating-point numbers."""
    work_px: int = 0
    """Pixels that a decoder may have to hold or pass over beyond those of the image."""


# --- Checks of a request ---


def parse_format(query: Mapping[str, str]) -> str | None:
    """Return the suffix of a query's format.

    Returns None where the query asks for none. Raises `Refusal`.
    """
    unknown = sorted(query.keys() - {"format"})
    if unknown:
        raise Refusal(400, f"unknown parameter {unknown[0][:40]!r}, expected format or none")

    format = query.get("format")
    if format is None:
        return None
    if format not in FORMATS:
        raise Refusal(400, f"format: {format[:20]!r} is not one of {', '.join(FORMATS)}")
    return f".{format}"


def check_headers(headers: Mapping[str, str], limits: UploadLimits) -> None:
    """Check a request's headers before its body is read.

    Raises `Refusal`.
    """
    media_type = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if media_type not in OTHER_MEDIA_TYPES and media_type not in MEDIA_TYPES.values():
        wanted = f"{EXPECTED} as the body and a type such as image/jpeg"
        raise Refusal(415, f"Content-Type {media_type[:60]!r} is not accepted, {wanted}")

    if headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "a body with a Content-Encoding is not accepted, expected the file as it is")

    # Without a length, `read_body` limits the body.
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _refuse_size(limits)


async def read_body(chunks: AsyncIterator[bytes], limits: UploadLimits, timeout_s: float) -> bytes:
    """Read the body within the limits.

    Raises `Refusal` as soon as the body is too long, whatever length the headers say, or takes too long to arrive.
    """
    parts, length = [], 0

    # Count while reading: a client may send more than it has declared.
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in chunks:
                length += len(chunk)
                if length > limits.max_bytes:
                    raise _refuse_size(limits)
                parts.append(chunk)
    except TimeoutError:
        raise Refusal(408, f"the upload took more than {timeout_s:g} s") from None

    return b"".join(parts)


def _refuse_size(limits: UploadLimits) -> Refusal:
    """Return the refusal of a body that is too long."""
    return Refusal(413, f"the file is larger than {limits.max_upload_mib} MiB")


def check_image(data: bytes, limits: UploadLimits) -> ImageHeader:
    """Return the header of an image that may be decoded.

    Raises `Refusal` for any other file.
    """
    if not data:
        raise Refusal(400, f"empty, {EXPECTED}")

    header = read_header(data)
    if header is None:
        raise Refusal(400, f"not an image, or a damaged one, {EXPECTED}")

    # The size.
    size = f"{header.width_px} x {header.height_px} px"
    if min(header.width_px, header.height_px) < limits.min_side_px:
        raise Refusal(422, f"{size} is too small, expected {limits.min_side_px} px a side at least")
    if header.width_px * header.height_px > limits.max_pixels:
        raise Refusal(422, f"{size} is too large, expected at most {limits.max_megapixels:g} megapixels")

    # The contents.
    if header.has_floats:
        raise Refusal(400, "its pixels are floating-point numbers, expected 8 or 16 bit integers")
    if header.has_frames:
        raise Refusal(422, "it has several frames or pages, expected one image")
    if header.work_px > limits.max_pixels:
        raise Refusal(422, f"a file of this structure takes too much work to decode ({size})")

    return header


# --- Headers of image files ---


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of an image file.

    Returns None for a damaged file, or one that is in none of the five formats.
    """
    for start, read in HEADER_READERS.items():
        if data.startswith(start):
            # A hostile file may make its reader raise any error.
            try:
                return read(data)
            except Exception:
                return None

    return None


def _read_png(data: bytes) -> ImageHeader:
    """Read a PNG's header."""
    file = PngImagePlugin.PngImageFile(io.BytesIO(data))
    return ImageHeader(".png", *file.size, has_frames=getattr(file, "n_frames", 1) > 1)


def _read_jpeg(data: bytes) -> ImageHeader:
    """Read a JPEG's header, and count its decoding passes."""
    width, height = JpegImagePlugin.JpegImageFile(io.BytesIO(data)).size

    # Entropy-coded data never contain this marker: the count is that of the scans, and perhaps of a thumbnail's.
    scans = data.count(JPEG_SCAN)
    return ImageHeader(".jpg", width, height, work_px=width * height * scans // USUAL_JPEG_SCANS)


def _read_bmp(data: bytes) -> ImageHeader:
    """Read a BMP's header."""
    return ImageHeader(".bmp", *BmpImagePlugin.BmpImageFile(io.BytesIO(data)).size)


def _read_webp(data: bytes) -> ImageHeader | None:
    """Read a WebP's header, of any of three kinds."""
    kind, body = data[12:16], data[20:]
    if data[8:12] != b"WEBP" or len(body) < MIN_WEBP_BYTES:
        return None

    # The canvas: flags in byte 0, then each side less 1 in 24 bits.
    if kind == WEBP_EXTENDED:
        width = 1 + int.from_bytes(body[4:7], "little")
        height = 1 + int.from_bytes(body[7:10], "little")
        return ImageHeader(".webp", width, height, has_frames=bool(body[0] & WEBP_ANIMATION_FLAG))

    # A signature byte, then each side less 1 in 14 bits.
    if kind == WEBP_LOSSLESS:
        bits = int.from_bytes(body[1:5], "little")
        return ImageHeader(".webp", 1 + (bits & WEBP_SIDE_MASK), 1 + (bits >> 14 & WEBP_SIDE_MASK))

    # A frame tag and a start code of 6 bytes, then each side in 14 of 16 bits.
    if kind == WEBP_LOSSY:
        width = int.from_bytes(body[6:8], "little") & WEBP_SIDE_MASK
        height = int.from_bytes(body[8:10], "little") & WEBP_SIDE_MASK
        return ImageHeader(".webp", width, height)
    return None


def _read_tiff(data: bytes) -> ImageHeader | None:
    """Read the header of a TIFF's first page."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        has_floats = page.sampleformat == TIFF_FLOAT
        if page.samplesperpixel > MAX_TIFF_SAMPLES or (page.bitspersample > MAX_TIFF_BITS and not has_floats):
            return None

        # A decoder holds a whole tile, which may be declared larger than the image.
        tile_px = page.tilewidth * page.tilelength
        return ImageHeader(".tif", page.imagewidth, page.imagelength, len(file.pages) > 1, has_floats, tile_px)


HEADER_READERS: dict[bytes, Callable[[bytes], ImageHeader | None]] = {
    b"\x89PNG\r\n\x1a\n": _read_png,
    b"\xff\xd8\xff": _read_jpeg,
    b"BM": _read_bmp,
    b"RIFF": _read_webp,
    **dict.fromkeys(TIFF_STARTS, _read_tiff),
}
"""By the first bytes of the file."""
