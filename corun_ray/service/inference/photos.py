"""Photographs as files that people keep: 8 or 16 bits, upright, with their colour profile and what the camera said."""

import io
from contextlib import suppress
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.data.images import decode_pixels

JPEG_QUALITY = WEBP_QUALITY = 95
PARAMETERS = {
    ".jpg": [
        *(cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ],
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY],
}
SIXTEEN_BITS = (".png", ".tif", ".tiff")
"""Formats that keep 16 bits; others get 8."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ICC_TAG, ORIENTATION_TAG, UPRIGHT = 34675, 0x0112, 1

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Photo:
    """Pixels `H W 3`, RGB in the file's own colour space, upright; and what to keep beside them."""

    pixels: Pixels
    colour_profile: bytes | None = None
    """ICC; None is sRGB by custom."""
    exif: bytes | None = None
    """With an orientation of upright."""

    def with_pixels(self, pixels: Pixels) -> "Photo":
        """The same photograph with other pixels."""
        return replace(self, pixels=pixels)


def read_photo(data: bytes) -> Photo:
    """Decodes a file; raises `BadImage`. An alpha channel is dropped, as by `decode_image`."""
    pixels = decode_pixels(data)
    if data.startswith(TIFF_STARTS):
        return Photo(pixels, _tiff_profile(data))
    return Photo(pixels, *_profile_and_exif(data))


def write_photo(photo: Photo, suffix: str) -> bytes:
    """Encodes for a file of this suffix (`.png`, `.jpg`, `.jpeg`, `.tif`, `.tiff`, `.webp`, `.bmp`)."""
    suffix = suffix.lower()
    pixels = photo.pixels
    if pixels.dtype == np.uint16 and suffix not in SIXTEEN_BITS:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if suffix in (".tif", ".tiff"):
        return _tiff(pixels, photo.colour_profile)
    kinds = {cv2.IMAGE_METADATA_EXIF: photo.exif, cv2.IMAGE_METADATA_ICCP: photo.colour_profile}
    kept = {kind: np.frombuffer(content, np.uint8) for kind, content in kinds.items() if content}
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    parameters = PARAMETERS.get(suffix.replace("jpeg", "jpg"), [])
    if suffix == ".bmp":
        kept = {}
    return cv2.imencodeWithMetadata(suffix, bgr, list(kept), list(kept.values()), parameters)[1].tobytes()


def _profile_and_exif(data: bytes) -> tuple[bytes | None, bytes | None]:
    """Damaged ones are left out: the picture is what counts."""
    from PIL import Image

    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        exif = image.getexif()
        if not exif:
            return image.info.get("icc_profile"), None
        if ORIENTATION_TAG in exif:
            exif[ORIENTATION_TAG] = UPRIGHT
        return image.info.get("icc_profile"), exif.tobytes().removeprefix(b"Exif\0\0")
    return None, None


def _tiff_profile(data: bytes) -> bytes | None:
    import tifffile

    with suppress(Exception), tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages.first.tags.get(ICC_TAG)
        return None if tag is None else bytes(tag.value)
    return None


def _tiff(pixels: Pixels, colour_profile: bytes | None) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="rgb", compression="zlib", iccprofile=colour_profile, metadata=None)
    return buffer.getvalue()
