"""Uploads that a served model must refuse: hostile, damaged, or no images; each with the status that it deserves."""

import io
import struct
import zlib
from dataclasses import dataclass, field

import cv2
import numpy as np
import tifffile

from tests.conftest import photograph

WIDTH_TAG, HEIGHT_TAG, TILE_WIDTH_TAG, TILE_HEIGHT_TAG = 256, 257, 322, 323


@dataclass(frozen=True)
class Upload:
    """A body, what is said of it, and the status it should get."""

    body: bytes
    status: int
    media_type: str = "application/octet-stream"
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)


def encoded(suffix: str, height_px: int = 48, width_px: int = 64) -> bytes:
    """A small photograph as a file."""
    image = photograph(np.random.default_rng(0), height_px, width_px)
    return cv2.imencode(suffix, image)[1].tobytes()


def png(width_px: int, height_px: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that declares a size, with chunks of one's own between header and end."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of_size(width_px: int, height_px: int) -> bytes:
    """A JPEG whose frame header declares another size."""
    data = bytearray(encoded(".jpg"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height_px, width_px)
    return bytes(data)


def bmp_of_size(width_px: int, height_px: int) -> bytes:
    """A BMP that declares another size."""
    data = bytearray(encoded(".bmp"))
    data[18:26] = struct.pack("<ii", width_px, height_px)
    return bytes(data)


def webp_of_size(width_px: int, height_px: int, flags: int = 0) -> bytes:
    """An extended WebP that declares a canvas."""
    canvas = bytes([flags, 0, 0, 0]) + (width_px - 1).to_bytes(3, "little") + (height_px - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + encoded(".webp")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(image: np.ndarray, tags: dict[int, int] | None = None, **options: object) -> bytes:
    """A TIFF, some of whose tags are then given other values."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, byteorder="<", metadata=None, **options)
    data = bytearray(buffer.getvalue())
    at = struct.unpack_from("<I", data, 4)[0]
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in (tags or {}):
            struct.pack_into("<HHII", data, entry, tag, 4, 1, (tags or {})[tag])
    return bytes(data)


def bad_uploads(max_mib: int) -> dict[str, Upload]:
    """By name; all within limits of 25 megapixels but those that are meant not to be."""
    grey = np.zeros((64, 64), np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    absurd_tiles = {TILE_WIDTH_TAG: 1 << 20, TILE_HEIGHT_TAG: 1 << 12}
    jpeg = encoded(".jpg")
    return {
        "empty body": Upload(b"", 400, "image/jpeg"),
        "text": Upload(b"a hazy day\n" * 20, 400, "image/png"),
        "truncated JPEG": Upload(encoded(".jpg")[:-200], 400, "image/jpeg"),
        "truncated PNG": Upload(encoded(".png")[:-200], 400, "image/png"),
        "PNG with damaged pixels": Upload(png(64, 64, (b"IDAT", b"not zlib")), 400, "image/png"),
        "PNG bomb": Upload(png(50_000, 50_000, (b"IDAT", zlib.compress(bytes(10_000)))), 422, "image/png"),
        "JPEG bomb": Upload(jpeg_of_size(65_000, 65_000), 422, "image/jpeg"),
        "JPEG of many scans": Upload(jpeg[:-2] + b"\xff\xda\0\0" * 200_000 + b"\xff\xd9", 422, "image/jpeg"),
        "WebP bomb": Upload(webp_of_size(16_000, 16_000), 422, "image/webp"),
        "animated WebP": Upload(webp_of_size(64, 48, flags=0x02), 422, "image/webp"),
        "BMP bomb": Upload(bmp_of_size(40_000, 40_000), 422, "image/bmp"),
        "TIFF bomb": Upload(tiff(grey, {WIDTH_TAG: 60_000, HEIGHT_TAG: 60_000}), 422, "image/tiff"),
        "TIFF of absurd tiles": Upload(tiff(noise, absurd_tiles, tile=(16, 16)), 422, "image/tiff"),
        "TIFF of several pages": Upload(tiff(np.zeros((3, 64, 64), np.uint8), photometric="minisblack"), 422),
        "floating-point TIFF": Upload(tiff(np.zeros((64, 64, 3), np.float32), photometric="rgb"), 400, "image/tiff"),
        "too small": Upload(encoded(".png", 12, 40), 422, "image/png"),
        "too many bytes": Upload(bytes(max_mib * 2**20 + 1), 413, "image/png"),
        "a form": Upload(b"--x\r\n\r\n" + jpeg + b"\r\n--x--", 415, "multipart/form-data; boundary=x"),
        "compressed body": Upload(zlib.compress(jpeg), 415, "image/jpeg", headers={"Content-Encoding": "deflate"}),
        "unknown format": Upload(jpeg, 400, "image/jpeg", "?format=gif"),
        "unknown parameter": Upload(jpeg, 400, "image/jpeg", "?size=9"),
    }
