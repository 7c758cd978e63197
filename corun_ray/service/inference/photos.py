"""Photographs as files for people: 8 or 16 bits, upright, with their colour profile and the camera's EXIF data."""

import io
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.ExifTags import IFD, Base

from corun_ray.core.data.formats import has_extra_channels, is_tiff
from corun_ray.core.data.images import decode_pixels

if TYPE_CHECKING:
    from PIL import Image

JPEG_QUALITY = 95
WEBP_QUALITY = 95
AVIF_QUALITY = 95
SAMPLING_444 = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
"""No chroma subsampling."""
JPEG_PARAMETERS = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLING_444]
ENCODER_PARAMETERS = {
    ".jpg": JPEG_PARAMETERS,
    ".jpeg": JPEG_PARAMETERS,
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY],
    ".avif": [cv2.IMWRITE_AVIF_QUALITY, AVIF_QUALITY],
}
SAME_FORMATS = {".jfif": ".jpg", ".jpe": ".jpg"}
"""Other suffixes of a format, which OpenCV's encoders do not know."""
SUFFIXES_OF_16_BITS = (".png", ".tif", ".tiff")
"""Formats that keep 16 bits; others get 8."""
ICC_TAG = int(Base.InterColorProfile)
ORIENTATION_TAG = int(Base.Orientation)
UPRIGHT = 1
"""EXIF's orientation of an image that needs no rotation."""
WIDTH_TAGS = (int(Base.ImageWidth), int(Base.ExifImageWidth))
HEIGHT_TAGS = (int(Base.ImageLength), int(Base.ExifImageHeight))
PIXEL_TAGS = (
    Base.BitsPerSample,
    Base.Compression,
    Base.PhotometricInterpretation,
    Base.SamplesPerPixel,
    Base.PlanarConfiguration,
    Base.StripOffsets,
    Base.StripByteCounts,
    Base.RowsPerStrip,
)
"""EXIF's tags that say how the pixels of the file read were stored."""

PROFILE_HEADER_BYTES = 128
COLOUR_SPACE = slice(16, 20)
PROFILE_MARK = slice(36, 40)
RGB_SPACE = b"RGB "
"""Layout of a profile's header: ICC.1:2022, 7.2."""
USUAL_GAMMA = 1 / 2.2
GAMMA_TOLERANCE = 0.01

ALPHA_DROPPED = "alpha channel dropped"

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Photo:
    """Upright pixels `H W 3`, RGB in the file's own colour space, and the metadata to keep."""

    pixels: Pixels
    colour_profile: bytes | None = None
    """ICC; None is sRGB by convention."""
    exif: bytes | None = None
    """EXIF data whose orientation is upright."""
    notes: tuple[str, ...] = ()
    """What of the file read is not in here, such as its alpha channel."""

    def with_pixels(self, pixels: Pixels) -> "Photo":
        """Return the same photograph with other pixels."""
        return replace(self, pixels=pixels)


def read_photo(data: bytes) -> Photo:
    """Decode a file.

    An alpha channel is dropped, as by `decode_image`, and so is a colour profile that is not of RGB pixels; the notes
    say so. Raises `BadImage`.
    """
    pixels = decode_pixels(data)
    if is_tiff(data):
        profile, exif = _read_tiff_profile(data), None
        notes = [ALPHA_DROPPED] if has_extra_channels(data) else []
    else:
        profile, exif, notes = _read_metadata(data, pixels.shape)

    # The pixels written are RGB, whatever those of the file are.
    reason = None if profile is None else _explain_unfit_profile(profile)
    if reason:
        profile = None
        notes.append(f"colour profile dropped: {reason}")
    return Photo(pixels, profile, exif, tuple(notes))


def write_photo(photo: Photo, suffix: str) -> bytes:
    """Encode a photograph for a file of this suffix.

    Suffixes are those of `IMAGE_SUFFIXES`, in any case.
    """
    suffix = SAME_FORMATS.get(suffix.lower(), suffix.lower())

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


def _read_metadata(data: bytes, shape: tuple[int, ...]) -> tuple[bytes | None, bytes | None, list[str]]:
    """Return colour profile, EXIF data and notes of a file whose upright pixels have this shape.

    Damaged metadata count as absent.
    """
    from PIL import Image

    # The pixels are decoded already: no error in the metadata should lose them.
    profile, exif, notes = None, None, []
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            notes.append(ALPHA_DROPPED)
        profile = image.info.get("icc_profile")

        # A profile says more than the bare number.
        gamma = image.info.get("gamma", USUAL_GAMMA)
        if not profile and "srgb" not in image.info and abs(gamma - USUAL_GAMMA) > GAMMA_TOLERANCE:
            notes.append(f"gamma of {gamma:.4g} dropped, so that viewers take {USUAL_GAMMA:.4g}")

        exif = _correct_exif(image.getexif(), shape)
    return profile, exif, notes


def _correct_exif(exif: "Image.Exif", shape: tuple[int, ...]) -> bytes | None:
    """Return EXIF data that hold for upright pixels of this shape; None for empty ones.

    Pillow leaves out the thumbnail, which shows the image as it was.
    """
    if not exif:
        return None

    # The decoder has turned the pixels, so viewers must not turn them again.
    if ORIENTATION_TAG in exif:
        exif[ORIENTATION_TAG] = UPRIGHT
    for tag in PIXEL_TAGS:
        exif.pop(int(tag), None)

    # Turning changes width and height.
    height_px, width_px = shape[:2]
    inner = [exif.get_ifd(IFD.Exif)] if IFD.Exif in exif else []
    for tags in (exif, *inner):
        tags.update({tag: width_px for tag in WIDTH_TAGS if tag in tags})
        tags.update({tag: height_px for tag in HEIGHT_TAGS if tag in tags})
    return exif.tobytes().removeprefix(b"Exif\0\0")


def _explain_unfit_profile(profile: bytes) -> str | None:
    """Return why a colour profile cannot stand beside RGB pixels, or None where it can."""
    if len(profile) < PROFILE_HEADER_BYTES or profile[PROFILE_MARK] != b"acsp":
        return "damaged"
    space = profile[COLOUR_SPACE]
    if space != RGB_SPACE:
        return f"of {space.decode('ascii', 'replace').strip()} colours, and RGB is written"
    return None


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
