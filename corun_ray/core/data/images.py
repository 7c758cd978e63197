"""Image and depth files: bytes in, arrays out, and one clear reason when a file cannot be used.

Headers of JPEG files are read without decoding. Their layout is ITU-T T.81: a file is a sequence of segments, each
begun by a marker; coded pixels follow the segments that begin a scan.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.data.formats import (
    PNG_CHUNK_BYTES,
    PNG_START,
    UnreadFormat,
    decode_avif,
    decode_tiff,
    is_avif,
    is_tiff,
    refuse_several_frames,
)
from corun_ray.core.foreign import HEAD_BYTES, recognise_foreign

MIN_SIDE_PX = 8
MAX_REASON_CHARS = 120

ImageU8 = NDArray[np.uint8]
"""An image `H W 3`, RGB, 0…255."""

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Reader of a .npy header by the file's version; version 3 is for names of fields, which depth never has."""

_HDF5_START = b"\x89HDF\r\n\x1a\n"
_MAT_HEADER_BYTES = 512
"""Bytes of MATLAB's own header, which a .mat file of version 7.3 has before its HDF5 content."""
_MAT_KEY = "depth"
_MATLAB_CLASS = "MATLAB_class"
"""The attribute of everything that MATLAB writes into an HDF5 file."""
_MAT_CLASSES = {"double", "single", "logical", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
_MAT_NUMBERS = frozenset(_MAT_CLASSES | {"float64", "float32", "float16", "bool"})
"""Kinds of arrays of real numbers: MATLAB's classes, and numpy's types where MATLAB did not write the file."""
_MAX_NAMED_ARRAYS = 6
"""Arrays of a .mat file that a message names."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END_MARKER = 0xD9
_JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of the segments that begin a frame, and so tell its size."""
# A marker that begins a segment or ends the file: neither a stuffed 0xFF of the coded data nor a restart marker.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)

_JPEG_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2 & ~cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_COLOR_4 & ~cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_COLOR_8 & ~cv2.IMREAD_COLOR | cv2.IMREAD_COLOR_RGB,
}
"""OpenCV's flags by the reduction; the JPEG decoder gives RGB as easily as BGR."""

# A refused file is reported once, by `BadImage`; OpenCV's own log lines would only repeat the report.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class BadImage(ValueError):
    """A file that cannot be used; the message is the reason on one line, the caller adds the path."""


# --- Photographs ---


def decode_image(data: bytes, least_px: int | None = None) -> ImageU8:
    """Decode a photograph to `H W 3`, RGB, uint8.

    16 bits are scaled to 8, rounded. With `least_px`, for callers that shrink the image anyway, a JPEG is decoded at a
    half, a quarter or an eighth of its size as long as both sides keep `least_px` pixels. That spares the decoder most
    of its work.

    Raises `BadImage` as `decode_pixels` does.
    """
    reduction = 1 if least_px is None else choose_reduction(data, least_px)
    image = decode_pixels(data, reduction)
    if image.dtype == np.uint16:
        return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return image.astype(np.uint8, copy=False)


def decode_pixels(data: bytes, reduction: int = 1) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Decode a photograph with its own bit depth.

    Returns `H W 3`, RGB, uint8 or uint16. A JPEG is decoded at 1/`reduction` of its size (1, 2, 4 or 8). Grey becomes
    three equal channels, and the EXIF orientation is applied. An alpha channel is dropped, not composited: the colours
    under it are the photograph.

    Raises `BadImage` if the file is empty, truncated, damaged, not an image, an animation, of several pages, has
    floating-point pixels, or has a side under 8 px.
    """
    if is_jpeg(data):
        image: NDArray = _decode(data, _JPEG_FLAGS[reduction])
    elif is_tiff(data) or is_avif(data):
        image = _decode_by_format(data)
    else:
        _refuse_several_frames(data)
        image = cv2.cvtColor(_decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH), cv2.COLOR_BGR2RGB)

    if image.dtype not in (np.uint8, np.uint16):
        raise BadImage(f"pixels are {image.dtype}, expected 8 or 16 bit integers")
    height_px, width_px = image.shape[:2]
    if min(height_px, width_px) < MIN_SIDE_PX:
        raise BadImage(f"{width_px} x {height_px} px is too small, expected {MIN_SIDE_PX} px a side at least")
    return image


def encode_png(rgb: ImageU8) -> bytes:
    """Encode `H W 3` RGB uint8 as a PNG file."""
    return cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def _refuse_foreign(data: bytes, expected: str) -> None:
    """Refuse what is often saved in the place of an image or a map: a page, a pointer, an answer of a server.

    Raises `BadImage`.
    """
    foreign = recognise_foreign(data[:HEAD_BYTES])
    if data and foreign is not None:
        raise BadImage(f"{foreign.what}, not {expected}; {foreign.advice}")


def _decode(data: bytes, flags: int) -> NDArray:
    """Decode a whole image file with OpenCV.

    Raises `BadImage` for an empty, truncated or damaged file.
    """
    # OpenCV's version decides whether half an image passes, so look for the end of the file here.
    if not data:
        raise BadImage("empty file")
    _refuse_foreign(data, "an image")
    if is_jpeg(data) and not has_jpeg_end(data):
        raise BadImage("truncated JPEG")
    if data.startswith(PNG_START) and not _has_png_end(data):
        raise BadImage("truncated PNG")

    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise BadImage(f"OpenCV refuses it: {error.err}") from error
    if image is None:
        raise BadImage("not an image, or a damaged one")
    return image


def _decode_by_format(data: bytes) -> NDArray:
    """Decode a whole TIFF or AVIF file.

    Raises `BadImage`.
    """
    try:
        image = decode_tiff(data) if is_tiff(data) else decode_avif(data)
    except UnreadFormat as error:
        raise BadImage(str(error)) from error
    except cv2.error as error:
        raise BadImage(f"OpenCV refuses it: {error.err}") from error
    if image is None:
        raise BadImage("not an image, or a damaged one")
    return image


def _refuse_several_frames(data: bytes) -> None:
    """Refuse an animation.

    Raises `BadImage`.
    """
    try:
        refuse_several_frames(data)
    except UnreadFormat as error:
        raise BadImage(str(error)) from error


def _has_png_end(data: bytes) -> bool:
    """Return whether a PNG's last chunk is present."""
    # Walk from chunk to chunk: length, type, data, checksum.
    position = len(PNG_START)
    while position + PNG_CHUNK_BYTES <= len(data):
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += PNG_CHUNK_BYTES + int.from_bytes(data[position : position + 4], "big")
    return False


# --- Depth maps ---


def decode_depth(data: bytes, suffix: str) -> NDArray:
    """Decode a depth map to `H W`.

    Values are real numbers in the file's own unit; the array may be a view of `data`. `suffix` is the file's: `.npy` or
    `.mat` (`H W`, `1 H W` or `H W 1`, any real dtype) or `.png` (8 or 16 bit, grey).

    Raises `BadImage` if the file cannot be read or has another shape; `DepthMap.from_pixels` checks the values.
    """
    match suffix.lower():
        case ".npy":
            depth = _drop_single_channel(_decode_npy(data))
        case ".png":
            depth = _decode_depth_png(data)
        case ".mat":
            depth = _drop_single_channel(_decode_mat(data))
        case _:
            raise BadImage(f"depth map is '{suffix}', expected .npy, .png or .mat")

    if depth.size == 0:
        raise BadImage("depth map is empty")
    return depth


def _drop_single_channel(depth: NDArray) -> NDArray:
    """Return `H W` of `H W`, `1 H W` or `H W 1`.

    Raises `BadImage` for another shape, and for anything but real numbers.
    """
    if depth.dtype.kind not in "fiub":
        raise BadImage(f"depth map is of {depth.dtype}, expected real numbers")
    if depth.ndim == 3 and depth.shape[0] == 1:
        return depth[0]
    if depth.ndim == 3 and depth.shape[2] == 1:
        return depth[..., 0]
    if depth.ndim != 2:
        raise BadImage(f"depth map has shape {depth.shape}, expected H W, 1 H W or H W 1")
    return depth


def _decode_npy(data: bytes) -> NDArray:
    """Decode a .npy file of any shape.

    Returns a view of `data`.

    Raises `BadImage` for a damaged file.
    """
    _refuse_foreign(data, "a depth map")
    # Unlike numpy's `read_array`, `frombuffer` makes no copy.
    try:
        file = io.BytesIO(data)
        read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, is_fortran, dtype = read_header(file)
        values = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        return values.reshape(shape, order="F" if is_fortran else "C")
    except Exception as error:
        # A damaged header can raise any error of Python's parser.
        reason = " ".join(str(error).split())[:MAX_REASON_CHARS]
        raise BadImage(f"not a readable .npy file: {reason}") from error


def _decode_depth_png(data: bytes) -> NDArray:
    """Decode a grey PNG to `H W`.

    Equal colour channels count as grey.

    Raises `BadImage` for colours.
    """
    depth = _decode(data, cv2.IMREAD_UNCHANGED)
    if depth.ndim == 2:
        return depth
    if (depth[..., :3] != depth[..., :1]).any():
        raise BadImage("depth PNG is in colour, expected grey")
    return depth[..., 0]


# --- MATLAB files ---


class _MatArray(NamedTuple):
    """What a .mat file tells of one of its arrays: MATLAB's class, and the shape as MATLAB has it."""

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} {' x '.join(map(str, self.shape))}".strip()

    @property
    def is_map(self) -> bool:
        """Whether this is an array of real numbers with two sides; MATLAB's scalars and vectors have fewer."""
        num_sides = sum(side > 1 for side in self.shape)
        return self.kind in _MAT_NUMBERS and len(self.shape) <= 3 and num_sides == 2


def _decode_mat(data: bytes) -> NDArray:
    """Decode the depth map of a MATLAB file.

    The map is the array `depth`, or else the only two-dimensional one of real numbers. Files of version 7.3 are HDF5,
    older ones have a format of their own.

    Raises `BadImage` for a damaged file, and for one without such an array.
    """
    _refuse_foreign(data, "a depth map")
    is_hdf5 = _HDF5_START in (data[: len(_HDF5_START)], data[_MAT_HEADER_BYTES:][: len(_HDF5_START)])
    try:
        return _read_hdf5_array(data) if is_hdf5 else _read_older_mat_array(data)
    except BadImage:
        raise
    except Exception as error:
        # A damaged file can raise any error of the two libraries.
        reason = " ".join(str(error).split())[:MAX_REASON_CHARS]
        raise BadImage(f"not a readable .mat file: {reason}") from error


def _read_hdf5_array(data: bytes) -> NDArray:
    """Read the depth map of a MATLAB file of version 7.3.

    MATLAB stores columns first, HDF5 counts rows first: an array that MATLAB wrote is turned back. Its attribute
    `MATLAB_class` tells; without one, another program wrote the array, which stays as it is.
    """
    import h5py

    with h5py.File(io.BytesIO(data), "r") as file:
        arrays = {name: _describe_hdf5_item(item) for name, item in file.items()}
        dataset = file[_choose_mat_array(arrays)]
        values = dataset[()]
        is_by_matlab = _MATLAB_CLASS in dataset.attrs

    return np.ascontiguousarray(values.T) if is_by_matlab else values


def _describe_hdf5_item(item: Any) -> _MatArray:
    """Describe an array of an HDF5 file as MATLAB has it."""
    # Structs and cells may be groups, without type and shape.
    shape = getattr(item, "shape", None) or ()
    dtype = getattr(item, "dtype", None)
    kind = item.attrs.get(_MATLAB_CLASS)
    if kind is None:
        return _MatArray("group" if dtype is None else str(dtype), shape)

    # Complex numbers are pairs of fields.
    name = kind.decode() if isinstance(kind, bytes) else str(kind)
    return _MatArray(f"complex {name}" if dtype is not None and dtype.names else name, shape[::-1])


def _read_older_mat_array(data: bytes) -> NDArray:
    """Read the depth map of a MATLAB file of version 7 or older."""
    import scipy.io

    arrays = {name: _MatArray(kind, shape) for name, shape, kind in scipy.io.whosmat(io.BytesIO(data))}
    name = _choose_mat_array(arrays)
    return scipy.io.loadmat(io.BytesIO(data), variable_names=[name])[name]


def _choose_mat_array(arrays: Mapping[str, _MatArray]) -> str:
    """Return the name of the depth map among a file's arrays.

    Raises `BadImage`, naming the arrays, where there is none or more than one.
    """
    # The array `depth` is meant, whatever else the file holds.
    if _MAT_KEY in arrays:
        if arrays[_MAT_KEY].kind not in _MAT_NUMBERS:
            raise BadImage(f"array '{_MAT_KEY}' is {arrays[_MAT_KEY]}, expected real numbers")
        return _MAT_KEY

    maps = [name for name, array in arrays.items() if array.is_map]
    if len(maps) == 1:
        return maps[0]

    # Tell what is there instead.
    found = [f"{name} ({array})" for name, array in list(arrays.items())[:_MAX_NAMED_ARRAYS]]
    if len(arrays) > _MAX_NAMED_ARRAYS:
        found.append(f"{len(arrays) - _MAX_NAMED_ARRAYS} more")
    listing = " ".join(", ".join(found).split()) or "nothing"
    raise BadImage(f".mat file holds {listing}; expected an array '{_MAT_KEY}', or just one of H W real numbers")


# --- Headers of JPEG files ---


def is_jpeg(data: bytes) -> bool:
    """Return whether a file begins as a JPEG does."""
    return data.startswith(_JPEG_START)


def has_jpeg_end(data: bytes) -> bool:
    """Return whether a JPEG's last segment is present."""
    return any(marker == _JPEG_END_MARKER for marker, _ in _walk_segments(data))


def choose_reduction(data: bytes, least_px: int) -> int:
    """Return the largest reduction that keeps `least_px` a side.

    The reduction is 8, 4, 2 or 1. Only JPEG files can be reduced: 1 for all others.
    """
    height_px, width_px = _read_jpeg_size(data) if is_jpeg(data) else (0, 0)
    for reduction in (8, 4, 2):
        if min(height_px, width_px) >= reduction * least_px:
            return reduction
    return 1


def limit_jpeg_height(data: bytes, rows: int) -> bytes:
    """Lower the height in a JPEG's header to `rows`.

    Decoders stop there. A lower height stays. All rows but the last 16 have the pixels of the whole image: colours at
    half the resolution are interpolated across blocks.
    """
    for marker, start in _walk_segments(data):
        if marker in _JPEG_FRAME_MARKERS:
            # After the marker: two bytes of length, one of precision, two of height, two of width.
            height = slice(start + 3, start + 5)
            lower = min(rows, int.from_bytes(data[height], "big"))
            return b"".join((data[: height.start], lower.to_bytes(2, "big"), data[height.stop :]))
    return data


def _read_jpeg_size(data: bytes) -> tuple[int, int]:
    """Read a JPEG's height and width in pixels.

    The EXIF orientation is not applied. Both are 0 where no frame's header is found.
    """
    for marker, start in _walk_segments(data):
        if marker in _JPEG_FRAME_MARKERS:
            height_px = int.from_bytes(data[start + 3 : start + 5], "big")
            width_px = int.from_bytes(data[start + 5 : start + 7], "big")
            return height_px, width_px
    return 0, 0


def _walk_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each segment's marker and the position after the marker.

    A plain search for bytes could find the markers of an embedded thumbnail.
    """
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        yield match[1][0], match.end()
        # Skip the segment by its length, which counts itself but not the marker.
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
