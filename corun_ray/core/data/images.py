"""Image and depth files: bytes in, arrays out, and one clear reason when a file cannot be used.

What a JPEG file says of itself, without decoding it.

Layout: ITU-T T.81. A file is a row of segments, each begun by a marker; coded pixels follow those that begin a scan."""

import io
import math
import re
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

MIN_SIDE_PX = 8

_PNG_START = b"\x89PNG\r\n\x1a\n"

_JPEG_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2 & ~cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_COLOR_4 & ~cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_COLOR_8 & ~cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB,
}
"""By the reduction; its decoder gives RGB as easily as BGR."""
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""By the file's version; version 3 is for names of fields, and depth has none."""

# A refused file is reported once, by `BadImage`; OpenCV's own lines would only repeat it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class BadImage(ValueError):
    """A file that cannot be used; the message is the reason on one line, the caller adds the path."""


def decode_image(data: bytes, least_px: int | None = None) -> NDArray[np.uint8]:
    """Decodes a photograph to `H W 3`, RGB, uint8: as `decode_pixels`, 16 bit scaled to 8 (rounded).

    With `least_px`, for those who will make it smaller anyway, a JPEG comes at a half, a quarter or an eighth of its
    size as long as both sides keep so many pixels: most of the work of its decoder is then never done.
    """
    image = decode_pixels(data, 1 if least_px is None else choose_reduction(data, least_px))
    if image.dtype == np.uint16:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return image.astype(np.uint8, copy=False)


def decode_pixels(data: bytes, reduction: int = 1) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decodes a photograph to `H W 3`, RGB, uint8 or uint16; a JPEG at 1/`reduction` of its size (1, 2, 4 or 8).

    Grey becomes three equal channels, the EXIF orientation is applied. An alpha channel is dropped, not composited:
    the colours under it are the photograph.

    Raises `BadImage` if the file is empty, truncated, damaged, no image, of floating-point pixels, or has a
    side under 8 px.
    """
    if is_jpeg(data):
        image: NDArray = _decode(data, _JPEG_FLAGS[reduction])
    else:
        # Not IMREAD_COLOR_RGB: OpenCV 5.0 gives wrong pixels for TIFF files of 16 bits then.
        image = cv2.cvtColor(_decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH), cv2.COLOR_BGR2RGB)
    if image.dtype not in (np.uint8, np.uint16):
        raise BadImage(f"pixels are {image.dtype}, expected 8 or 16 bit integers")
    height_px, width_px = image.shape[:2]
    if min(height_px, width_px) < MIN_SIDE_PX:
        raise BadImage(f"{width_px} x {height_px} px is too small, expected {MIN_SIDE_PX} px a side at least")
    return image


def decode_depth(data: bytes, suffix: str) -> NDArray:
    """Decodes a depth map to `H W`, real numbers in the file's own unit; perhaps a view of `data`.

    `suffix` is the file's: `.npy` (`H W` or `1 H W`, any real dtype) or `.png` (8 or 16 bit, grey).

    Raises `BadImage` if the file cannot be read or has another shape; `DepthMap.from_pixels` looks at the values.
    """
    match suffix.lower():
        case ".npy":
            depth = _decode_npy(data)
        case ".png":
            depth = _decode_depth_png(data)
        case ".mat":
            raise BadImage(".mat: MATLAB depth maps are not read; convert to .npy")
        case _:
            raise BadImage(f"depth map is '{suffix}', expected .npy or .png")
    if depth.size == 0:
        raise BadImage("depth map is empty")
    return depth


def encode_png(rgb: NDArray[np.uint8]) -> bytes:
    """Encodes `H W 3` RGB uint8 as a PNG file."""
    return cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def _decode(data: bytes, flags: int) -> NDArray:
    if not data:
        raise BadImage("empty file")
    # Whether half an image passes depends on the decoder's version: so look for the end here.
    if is_jpeg(data) and not has_jpeg_end(data):
        raise BadImage("truncated JPEG")
    if data.startswith(_PNG_START) and not _png_has_end(data):
        raise BadImage("truncated PNG")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise BadImage(f"OpenCV refuses it: {error.err}") from error
    if image is None:
        raise BadImage("not an image, or a damaged one")
    return image


def _png_has_end(data: bytes) -> bool:
    position = len(_PNG_START)
    while position + 12 <= len(data):  # a chunk: length, type, data, checksum
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False


def _decode_npy(data: bytes) -> NDArray:
    try:
        file = io.BytesIO(data)
        # Unlike `read_array`, without a copy.
        read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, is_fortran, dtype = read_header(file)
        count = math.prod(shape)
        depth = np.frombuffer(data, dtype, count, file.tell()).reshape(shape, order="F" if is_fortran else "C")
    except Exception as error:  # a damaged header lets any error of Python's parser through
        reason = " ".join(str(error).split())[:120]
        raise BadImage(f"not a readable .npy file: {reason}") from error
    if depth.dtype.kind not in "fiub":
        raise BadImage(f"depth map is of {depth.dtype}, expected real numbers")
    if depth.ndim == 3 and depth.shape[0] == 1:
        depth = depth[0]
    if depth.ndim != 2:
        raise BadImage(f"depth map has shape {depth.shape}, expected H W or 1 H W")
    return depth


def _decode_depth_png(data: bytes) -> NDArray:
    depth = _decode(data, cv2.IMREAD_UNCHANGED)
    if depth.ndim == 2:
        return depth
    if (depth[..., :3] != depth[..., :1]).any():
        raise BadImage("depth PNG is in colour, expected grey")
    return depth[..., 0]


_START = b"\xff\xd8\xff"
_END = 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segments that begin a frame, and so tell its size."""
# Any marker that a segment or the end follows: neither a stuffed 0xFF of the coded data nor a restart.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)


def is_jpeg(data: bytes) -> bool:
    """Whether a file begins as a JPEG does."""
    return data.startswith(_START)


def has_jpeg_end(data: bytes) -> bool:
    """Whether a JPEG's last segment is there."""
    return any(marker == _END for marker, _ in _segments(data))


def choose_reduction(data: bytes, least_px: int) -> int:
    """By how much (1, 2, 4, 8) a file may be reduced for both sides to keep `least_px`; 1 for all but JPEG."""
    height_px, width_px = _sides(data) if is_jpeg(data) else (0, 0)
    return next((by for by in (8, 4, 2) if min(height_px, width_px) >= by * least_px), 1)


def limit_jpeg_height(data: bytes, rows: int) -> bytes:
    """The same file, but that its header promises no more than `rows` pixels of height: decoders stop there.

    Up to the last 16, rows have the pixels of the whole: colours at half the resolution are interpolated across blocks.
    """
    for marker, start in _segments(data):
        if marker in _FRAMES:
            height = slice(start + 3, start + 5)
            lower = min(rows, int.from_bytes(data[height], "big"))
            return b"".join((data[: height.start], lower.to_bytes(2, "big"), data[height.stop :]))
    return data


def _sides(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, before its EXIF orientation is applied; 0 where no frame's header is found."""
    for marker, start in _segments(data):
        if marker in _FRAMES:
            return int.from_bytes(data[start + 3 : start + 5], "big"), int.from_bytes(
                data[start + 5 : start + 7], "big"
            )
    return 0, 0


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Each segment's marker and where it starts; to search for bytes alone could find an embedded thumbnail's."""
    position = 2
    while match := _MARKER.search(data, position):
        yield match[1][0], match.end()
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")


ImageU8 = NDArray[np.uint8]
