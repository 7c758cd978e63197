"""Photographs as files for people: 8 or 16 bits, upright, with their colour profile and the camera's EXIF data."""

import io
from contextlib import suppress
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.ExifTags import Base

from corun_ray.core.data.images import decode_pixels

JPEG_QUALITY = 95
WEBP_QUALITY = 95
SAMPLING_444 = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
"""No chroma subsampling."""
JPEG_PARAMETERS = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLING_444]
ENCODER_PARAMETERS = {
    ".jpg": JPEG_PARAMETERS,
    ".jpeg": JPEG_PARAMETERS,
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY],
}
SUFFIXES_OF_16_BITS = (".png", ".tif", ".tiff")
"""Formats that keep 16 bits; others get 8."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of TIFF and BigTIFF files, of either byte order."""
ICC_TAG = int(Base.InterColorProfile)
ORIENTATION_TAG = int(Base.Orientation)
UPRIGHT = 1
"""EXIF's orientation of an image that needs no rotation."""

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Photo:
    """Upright pixels `H W 3`, RGB in the file's own colour space, and the metadata to keep."""

    pixels: Pixels
    colour_profile: bytes | None = None
    """ICC; None is sRGB by convention."""
    exif: bytes | None = None
    """EXIF data whose orientation is upright."""

    def with_pixels(self, pixels: Pixels) -> "Photo":
        """Return the same photograph with other pixels."""
        return replace(self, pixels=pixels)


def read_photo(data: bytes) -> Photo:
    """Decode a file.

    An alpha channel is dropped, as by `decode_image`. Raises `BadImage`.
    """
    pixels = decode_pixels(data)
    if data.startswith(TIFF_STARTS):
        return Photo(pixels, _read_tiff_profile(data))
    profile, exif = _read_metadata(data)
    return Photo(pixels, profile, exif)


def write_photo(photo: Photo, suffix: str) -> bytes:
    """Encode a photograph for a file of this suffix.

    Suffixes are `.png`, `.jpg`, `.jpeg`, `.tif`, `.tiff`, `.webp` and `.bmp`.
    """
    suffix = suffix.lower()

    # Round 16 bits to 8 where the format has no more: 257 maps 65535 to 255.
    pixels = photo.pixels
    if pixels.dtype == np.uint16 and suffix not in SUFFIXES_OF_16_BITS:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)

    # tifffile writes TIFFs, with their colour profile.
    if suffix in (".tif", ".tiff"):
        return _encode_tiff(pixels, photo.colour_profile)

    # Collect the metadata that the photograph has. A BMP keeps none.
    kinds, contents = [], []
    for kind, content in ((cv2.IMAGE_METADATA_EXIF, photo.exif), (cv2.IMAGE_METADATA_ICCP, photo.colour_profile)):
        if content and suffix != ".bmp":
            kinds.append(kind)
            contents.append(np.frombuffer(content, np.uint8))

    # OpenCV takes BGR.
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    parameters = ENCODER_PARAMETERS.get(suffix, [])
    return cv2.imencodeWithMetadata(suffix, bgr, kinds, contents, parameters)[1].tobytes()


def _read_metadata(data: bytes) -> tuple[bytes | None, bytes | None]:
    """Return colour profile and EXIF data.

    Damaged metadata count as absent.
    """
    from PIL import Image

    # The pixels are decoded already: no error in the metadata should lose them.
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        exif = image.getexif()
        profile = image.info.get("icc_profile")
        if not exif:
            return profile, None

        # The decoder has turned the pixels, so viewers must not turn them again.
        if ORIENTATION_TAG in exif:
            exif[ORIENTATION_TAG] = UPRIGHT
        return profile, exif.tobytes().removeprefix(b"Exif\0\0")
    return None, None


def _read_tiff_profile(data: bytes) -> bytes | None:
    """Return a TIFF's colour profile.

    A damaged profile counts as absent.
    """
    import tifffile

    with suppress(Exception), tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages.first.tags.get(ICC_TAG)
        return None if tag is None else bytes(tag.value)
    return None


def _encode_tiff(pixels: Pixels, colour_profile: bytes | None) -> bytes:
    """Encode a TIFF, compressed without loss."""
    import tifffile

    # metadata=None: without a description of tifffile's own.
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="rgb", compression="zlib", iccprofile=colour_profile, metadata=None)
    return buffer.getvalue()
