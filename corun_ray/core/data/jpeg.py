"""What a JPEG file says of itself, without decoding it.

Layout: ITU-T T.81. A file is a row of segments, each begun by a marker; coded pixels follow those that begin a scan.
"""

import re
from collections.abc import Iterator

_START = b"\xff\xd8\xff"
_END = 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segments that begin a frame, and so tell its size."""
# Any marker that a segment or the end follows: neither a stuffed 0xFF of the coded data nor a restart.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)


def is_jpeg(data: bytes) -> bool:
    """Whether a file begins as a JPEG does."""
    return data.startswith(_START)


def has_end(data: bytes) -> bool:
    """Whether a JPEG's last segment is there."""
    return any(marker == _END for marker, _ in _segments(data))


def reduction(data: bytes, least_px: int) -> int:
    """By how much (1, 2, 4, 8) a file may be reduced for both sides to keep `least_px`; 1 for all but JPEG."""
    height_px, width_px = _sides(data) if is_jpeg(data) else (0, 0)
    return next((by for by in (8, 4, 2) if min(height_px, width_px) >= by * least_px), 1)


def shortened(data: bytes, rows: int) -> bytes:
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
