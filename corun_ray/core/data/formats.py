"""Image files that OpenCV reads otherwise than they are meant: TIFF, AVIF, and files of several frames.

OpenCV multiplies the colours of a TIFF by its alpha channel, turns no AVIF upright, and gives the first frame of an
animation as if it were the image. Layouts: TIFF 6.0; ISO/IEC 14496-12 (the boxes of AVIF); RFC 9649 (WebP); the PNG
specification (chunks).
"""

import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.foreign import list_brands

PNG_START = b"\x89PNG\r\n\x1a\n"
# A chunk of a PNG file holds four bytes each of length, type and checksum, besides its data.
PNG_CHUNK_BYTES = 12
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of TIFF and BigTIFF files, of either byte order."""
AVIF_BRANDS = frozenset({b"avif", b"avis"})
GIF_STARTS = (b"GIF87a", b"GIF89a")

SEVERAL_FRAMES = "it has several frames or pages, expected one image"

_REDUCED_OR_MASK = 0b101
"""Bits of a TIFF page's type: a smaller copy of another page, or a mask of one."""
_ASSOCIATED, _UNASSOCIATED = 1, 2
"""TIFF's kinds of alpha channels; the colours of the first are stored multiplied by it."""
_WHITE_IS_ZERO = 0
_COLOUR_CHANNELS = {_WHITE_IS_ZERO: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
"""Channels of TIFF's colour spaces that are read: grey of both kinds, RGB, palette, CMYK, YCbCr."""
_SEPARATE_PLANES = 2

_WEBP_HEADER_BYTES = 12
_RIFF_CHUNK_BYTES = 8
_WEBP_FRAME = b"ANMF"

_ROTATIONS = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}
"""EXIF's orientation → quarter turns to the left that make the image upright, before any mirroring."""
_MIRRORED = (2, 4, 5, 7)


class UnreadFormat(ValueError):
    """A file that is not what this package reads; the message is the reason on one line."""


# --- Files of several frames ---


def refuse_several_frames(data: bytes) -> None:
    """Refuse an animated PNG, WebP or GIF; TIFF and AVIF are refused where they are decoded.

    Raises `UnreadFormat`.
    """
    is_animated = False
    if data.startswith(PNG_START):
        is_animated = _count_png_frames(data) > 1
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        is_animated = _count_webp_frames(data) > 1
    elif data.startswith(GIF_STARTS):
        is_animated = _count_gif_frames(data) > 1

    if is_animated:
        raise UnreadFormat(SEVERAL_FRAMES)


def _count_png_frames(data: bytes) -> int:
    """Return how many frames a PNG declares before its pixels begin."""
    position = len(PNG_START)
    while position + PNG_CHUNK_BYTES <= len(data):
        kind = data[position + 4 : position + 8]
        if kind == b"acTL":
            return int.from_bytes(data[position + 8 : position + 12], "big")
        if kind == b"IDAT":
            return 1
        position += PNG_CHUNK_BYTES + int.from_bytes(data[position : position + 4], "big")
    return 1


def _count_webp_frames(data: bytes) -> int:
    """Return how many frames an animated WebP holds; 0 for one that is not animated."""
    frames = 0
    position = _WEBP_HEADER_BYTES
    while position + _RIFF_CHUNK_BYTES <= len(data):
        frames += data[position : position + 4] == _WEBP_FRAME
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        # Chunks are padded to an even length.
        position += _RIFF_CHUNK_BYTES + length + length % 2
    return frames


def _count_gif_frames(data: bytes) -> int:
    """Return how many frames a GIF holds; 1 where it is damaged, which its decoder tells."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return getattr(image, "n_frames", 1)
    except (OSError, ValueError, SyntaxError):
        return 1


# --- TIFF ---


@dataclass(frozen=True)
class _TiffHeader:
    """What decides how the pixels of a TIFF are read."""

    alpha: int
    """`_ASSOCIATED`, `_UNASSOCIATED`, or 0 where the file names no channel alpha."""
    num_extra: int
    """Channels beside the colours."""
    extra_samples_at: slice
    """Where the file says what its channels beside the colours are; empty without any."""
    is_inverted: bool
    """Whether OpenCV leaves white at 0."""


def is_tiff(data: bytes) -> bool:
    """Return whether a file begins as a TIFF does."""
    return data.startswith(TIFF_STARTS)


def has_extra_channels(data: bytes) -> bool:
    """Return whether a TIFF has alpha or other channels beside its colours.

    Raises `UnreadFormat`.
    """
    return _read_tiff_header(data).num_extra > 0


def decode_tiff(data: bytes) -> NDArray | None:
    """Decode a TIFF to `H W 3`, RGB, upright, with its own bit depth; None for a damaged file.

    The colours are those under the alpha channel. Where they are stored multiplied by it, they are divided by it;
    nothing is known of colours under an alpha of 0, which are black.

    Raises `UnreadFormat`, and `cv2.error`.
    """
    header = _read_tiff_header(data)

    # OpenCV leaves the colours alone where the file does not say that the fourth channel is alpha.
    plain = data
    if header.alpha:
        place = header.extra_samples_at
        plain = b"".join((data[: place.start], bytes(place.stop - place.start), data[place.stop :]))
    content = np.frombuffer(plain, np.uint8)

    # Not IMREAD_COLOR_RGB: with it, OpenCV 5.0 gives wrong pixels for TIFF files of 16 bits.
    image = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        return None
    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    if header.is_inverted and rgb.dtype == np.uint16:
        rgb = np.iinfo(np.uint16).max - rgb
    if header.alpha == _ASSOCIATED:
        whole = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        if whole is not None and whole.ndim == 3 and whole.shape[2] == 4:
            rgb = _divide_by_alpha(rgb, whole[..., 3])
    return rgb


def _read_tiff_header(data: bytes) -> _TiffHeader:
    """Read the header of a TIFF's only full page.

    Raises `UnreadFormat` for a damaged header, several pages, and pixels that OpenCV would read wrongly.
    """
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages.first
            num_full = 0
            for one in file.pages:
                num_full += not int(getattr(one, "subfiletype", 0)) & _REDUCED_OR_MASK
                if num_full > 1:
                    break

            bits, photometric = page.bitspersample, int(page.photometric)
            num_samples, planes = page.samplesperpixel, int(page.planarconfig or 1)
            extra = [int(kind) for kind in page.extrasamples]
            tag = page.tags.get("ExtraSamples")
            place = slice(0, 0) if tag is None else slice(tag.valueoffset, tag.valueoffset + tag.count * 2)
    except Exception as error:
        # A damaged header can raise any error of the library.
        raise UnreadFormat("not an image, or a damaged one") from error

    if num_full > 1 or int(page.subfiletype) & _REDUCED_OR_MASK:
        raise UnreadFormat(SEVERAL_FRAMES)
    if photometric not in _COLOUR_CHANNELS:
        name = getattr(page.photometric, "name", photometric)
        raise UnreadFormat(f"a TIFF in the colour space {name}, expected RGB, grey, a palette, CMYK or YCbCr")
    if planes == _SEPARATE_PLANES and num_samples > 1 and bits > 8:
        raise UnreadFormat(f"a TIFF of {bits} bits in separate planes, expected the colours of a pixel side by side")

    # Only the channels behind the colours can be alpha, and only the first of them is.
    alpha = extra[0] if extra and extra[0] in (_ASSOCIATED, _UNASSOCIATED) else 0
    num_extra = num_samples - _COLOUR_CHANNELS[photometric]
    return _TiffHeader(alpha, num_extra, place, photometric == _WHITE_IS_ZERO)


def _divide_by_alpha(rgb: NDArray, alpha: NDArray) -> NDArray:
    """Divide colours `H W 3` by their alpha `H W`; both are integers of one type, whose greatest value is 1."""
    most = np.iinfo(rgb.dtype).max
    share = np.maximum(alpha, 1).astype(np.float32)[..., None] / most
    colours = np.minimum(np.round(rgb / share), most).astype(rgb.dtype)
    return np.where(alpha[..., None] > 0, colours, 0)


# --- AVIF ---


def is_avif(data: bytes) -> bool:
    """Return whether a file begins as an AVIF does: that is its main brand, or one that it also fits."""
    return not AVIF_BRANDS.isdisjoint(list_brands(data))


def decode_avif(data: bytes) -> NDArray[np.uint8]:
    """Decode an AVIF to `H W 3`, RGB, 8 bits, upright.

    Raises `UnreadFormat` for a damaged file, an animation, and where Pillow was built without AVIF.
    """
    from PIL import Image, features
    from PIL.ExifTags import Base

    if not features.check("avif"):
        raise UnreadFormat("an AVIF, which the installed Pillow does not read")

    try:
        with Image.open(io.BytesIO(data)) as image:
            num_frames = getattr(image, "n_frames", 1)
            # Pillow tells the file's own turns and mirrors as EXIF's orientation, and leaves the pixels as they are.
            orientation = image.getexif().get(int(Base.Orientation), 1)
            pixels = np.asarray(image.convert("RGBA"))[..., :3]
    except Exception as error:
        # A damaged file can raise any error of the library.
        raise UnreadFormat("not an image, or a damaged one") from error

    if num_frames > 1:
        raise UnreadFormat(SEVERAL_FRAMES)
    return _turn_upright(pixels, orientation)


def _turn_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror pixels as EXIF's `orientation` asks for."""
    turned = np.rot90(pixels, _ROTATIONS.get(orientation, 0))
    return np.ascontiguousarray(turned[:, ::-1] if orientation in _MIRRORED else turned)
