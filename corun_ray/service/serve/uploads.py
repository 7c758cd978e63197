"""What may be uploaded to be dehazed, judged before a pixel is decoded; and what is said of the rest."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from corun_ray.service.serve.image_headers import ImageHeader, read_header

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


class Refused(Exception):
    """A request that is not served: HTTP's `status`, and the reason in a line for a person."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Limits:
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


def wanted_suffix(query: Mapping[str, str]) -> str | None:
    """The suffix of the format that the query asks for, None where it does not; raises `Refused`."""
    if unknown := sorted(query.keys() - {"format"}):
        raise Refused(400, f"unknown parameter {unknown[0][:40]!r}, expected format or none")
    format = query.get("format")
    if format is not None and format not in FORMATS:
        raise Refused(400, f"format: {format[:20]!r} is not one of {', '.join(FORMATS)}")
    return format and f".{format}"


def check_headers(headers: Mapping[str, str], limits: Limits) -> None:
    """Refuses by what the request says of its body, before any of it has been read."""
    media_type = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if media_type not in OTHER_NAMES and media_type not in MEDIA_TYPES.values():
        raise Refused(
            415, f"Content-Type {media_type[:60]!r} is not taken, {EXPECTED} as the body and a type such as image/jpeg"
        )
    if headers.get("content-encoding", "identity") != "identity":
        raise Refused(415, "a body with a Content-Encoding is not taken, expected the file as it is")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _too_many_bytes(limits)


async def read_body(chunks: AsyncIterator[bytes], limits: Limits, timeout_s: float) -> bytes:
    """The body, whatever the headers said of its length; raises `Refused` as soon as it is too long, and when late."""
    parts, length = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in chunks:
                length += len(chunk)
                if length > limits.max_bytes:
                    raise _too_many_bytes(limits)
                parts.append(chunk)
    except TimeoutError:
        raise Refused(408, f"the upload took more than {timeout_s:g} s") from None
    return b"".join(parts)


def _too_many_bytes(limits: Limits) -> Refused:
    return Refused(413, f"the file is larger than {limits.max_upload_mib} MiB")


def check_image(data: bytes, limits: Limits) -> ImageHeader:
    """What the file says of its image, which may be decoded then; raises `Refused`."""
    if not data:
        raise Refused(400, f"empty, {EXPECTED}")
    header = read_header(data)
    if header is None:
        raise Refused(400, f"not an image, or a damaged one, {EXPECTED}")
    size = f"{header.width_px} x {header.height_px} px"
    if min(header.width_px, header.height_px) < limits.min_side_px:
        raise Refused(422, f"{size} is too small, expected {limits.min_side_px} px a side at least")
    if header.width_px * header.height_px > limits.max_pixels:
        raise Refused(422, f"{size} is too large, expected at most {limits.max_megapixels:g} megapixels")
    if header.has_floats:
        raise Refused(400, "its pixels are floating-point numbers, expected 8 or 16 bit integers")
    if header.has_frames:
        raise Refused(422, "it has several frames or pages, expected one image")
    if header.work_px > limits.max_pixels:
        raise Refused(422, f"a file of this structure takes too much work to decode ({size})")
    return header
