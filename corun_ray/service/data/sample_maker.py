"""Training samples of a job, each by its index in the run's stream: which images it takes, and how it is made.

Sample `i` is image `permutation(seed, epoch)[i % n]` of each kind, `epoch = i // n`, and everything random about it
follows from `(seed, i)`.


A region of a photograph without the work on what lies below it.

OpenCV decodes JPEG files whole; so does Pillow, but it does not print that coded data are left over, when a file's
header promises fewer rows than there are. Both give the same pixels."""

import io
import math
import posixpath
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.core.data import samples
from corun_ray.core.data.augment import Sliceable
from corun_ray.core.data.depth import DepthMap, draw_procedural_depth
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.images import (
    MIN_SIDE_PX,
    BadImage,
    decode_depth,
    decode_image,
    has_jpeg_end,
    is_jpeg,
    limit_jpeg_height,
)
from corun_ray.core.timing import phase
from corun_ray.service.data.cache import CacheView
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.storage import MissingFile

UPRIGHT = 1
CONTEXT_ROWS = 16
MAX_PX = 2**30
"""More OpenCV decodes of no image. A region costs little of any, but what has its image's shape is allocated, too."""


def read_cuttable_sides(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels of a photograph that `decode_region` saves work on; None: decode it as a whole.

    That is every whole JPEG of three colours of 8 bits which its EXIF orientation does not turn.
    """
    if not is_jpeg(data) or not has_jpeg_end(data):
        return None
    try:
        file = JpegImageFile(io.BytesIO(data))
        if file.mode != "RGB" or file.getexif().get(Base.Orientation, UPRIGHT) != UPRIGHT:
            return None
    except Exception:  # a damaged header lets any error of its reader through; who decodes the whole names it
        return None
    sides_px = file.height, file.width
    return sides_px if min(sides_px) >= MIN_SIDE_PX and math.prod(sides_px) <= MAX_PX else None


def decode_region(data: bytes, rows: slice, columns: slice) -> NDArray[np.uint8]:
    """Decodes a region of a photograph with `read_cuttable_sides` to `h w 3`, RGB uint8: the pixels of `decode_image`.

    Raises `BadImage` as that does, but not for what is damaged below the region.
    """
    try:
        file = JpegImageFile(io.BytesIO(limit_jpeg_height(data, rows.stop + CONTEXT_ROWS)))
        return np.asarray(file.crop((columns.start, rows.start, columns.stop, rows.stop)))
    except OSError:  # Pillow gives up on it: OpenCV has the last word, as on every other file
        return decode_image(data)[rows, columns]


T = TypeVar("T")
Kept = TypeVar("Kept", np.ndarray, DepthMap)
Batch = dict[str, np.ndarray]

CLEAR, HAZY = 0, 1
"""Which permutation and which random numbers: each kind of image has its own."""


class TooManyBadFiles(Exception):
    """More unusable images than `data.max_bad_fraction` allows."""


@lru_cache(maxsize=4)
def draw_permutation(seed: int, kind: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch, `length` int64."""
    return np.random.default_rng([seed, kind, epoch]).permutation(length)


def choose_image(seed: int, kind: int, index: int, length: int, attempt: int = 0) -> int:
    """Which of `length` images sample `index` uses; `attempt` > 0 names its stand-ins, should that be unusable."""
    epoch, position = divmod(index, length)
    return int(draw_permutation(seed, kind, epoch, length)[(position + attempt) % length])


@dataclass(frozen=True)
class SampleMaker:
    """Makes the samples of one job: reads, decodes, synthesises. Pure but for the reading."""

    job: TrainingJob
    manifest: Manifest
    patch_px: int
    report_bad: Callable[[dict[str, str]], None]
    cache: CacheView | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Indices (`id`, b) → `index`, `hazy`, `clear` and, for Colabator, `weak`, `strong` (b p p 3 uint8), `key`."""
        rows = [self.sample(int(index)) for index in batch["id"]]
        columns: Batch = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "key"}
        columns["index"] = batch["id"]
        if "key" in rows[0]:
            columns["key"] = np.array([row["key"] for row in rows], dtype=object)
        return columns

    def sample(self, index: int) -> dict[str, Any]:
        """One sample of the stream."""
        pair = self._first_usable(CLEAR, index, len(self.manifest.clear), self._pair)
        row: dict[str, Any] = {"hazy": pair.hazy, "clear": pair.clear}
        if isinstance(self.job, ColabatorJob):
            # The real image of a sample goes through JPEG exactly when the synthetic one does.
            key, views = self._first_usable(
                HAZY, index, len(self.manifest.hazy), lambda i, rng: self._real(i, rng, pair.jpeg_quality)
            )
            row |= {"weak": views.weak, "strong": views.strong, "key": key}
        return row

    def _first_usable(self, kind: int, index: int, length: int, make: Callable[[int, np.random.Generator], T]) -> T:
        """The sample's own image or, where that is unusable, the next of its epoch's order."""
        for attempt in range(length):
            image = choose_image(self.job.seed, kind, index, length, attempt)
            try:
                return make(image, np.random.default_rng([self.job.seed, kind, index, attempt]))
            except _Unusable as error:
                self.report_bad({error.uri: error.reason})
        raise TooManyBadFiles(f"not one of the {length} {'clear' if kind == CLEAR else 'hazy'} images can be used")

    def _pair(self, image: int, rng: np.random.Generator) -> samples.Pair:
        return self._synthetic(image, rng) if self.job.data.paired is None else self._paired(image, rng)

    def _paired(self, image: int, rng: np.random.Generator) -> samples.Pair:
        data = self.job.data
        assert data.paired is not None and self.manifest.paired_hazy is not None
        hazy_key = self.manifest.paired_hazy[image]
        hazy = self._cuttable(data.paired.hazy, hazy_key)
        clear = self._cuttable(data.paired.clear, self.manifest.clear[image])
        with BlameFile(data.paired.hazy, hazy_key):
            return samples.crop_pair(
                hazy, clear, rng, patch_px=self.patch_px, random_resize=data.random_resize, rotation=data.rotation
            )

    def _synthetic(self, image: int, rng: np.random.Generator) -> samples.Pair:
        data, haze = self.job.data, self.job.haze
        assert data.clear is not None
        clear_key = self.manifest.clear[image]
        clear = self._cuttable(data.clear, clear_key)
        if self.manifest.depth is None:
            depth_root, depth_key = data.clear, clear_key
            with phase("depth"):
                depth_map = draw_procedural_depth(rng, clear.shape[0], clear.shape[1])
        else:
            assert data.depth is not None
            depth_root, depth_key = data.depth, self.manifest.depth[image]
            depth_map = self._depth(depth_root, depth_key)
        with BlameFile(depth_root, depth_key):
            return samples.make_synthetic_pair(
                clear,
                depth_map,
                rng,
                patch_px=self.patch_px,
                haze_range=HazeRange(haze.beta, haze.airlight, haze.airlight_tint),
                random_resize=data.random_resize,
                rotation=data.rotation,
            )

    def _real(self, image: int, rng: np.random.Generator, jpeg_quality: int | None) -> tuple[str, samples.RealViews]:
        assert isinstance(self.job, ColabatorJob)
        key = self.manifest.hazy[image]
        least_px = samples.compute_real_side_px(self.patch_px)
        hazy = self._image(self.job.data.hazy, key, least_px)
        return key, samples.make_real_views(hazy, rng, patch_px=self.patch_px, jpeg_quality=jpeg_quality)

    def _cuttable(self, root: str, key: str) -> Sliceable:
        """An image for those who take a region of it: decoded no further, unless the whole is to be kept."""
        if self.cache is not None:
            return self._image(root, key)
        with BlameFile(root, key):
            content = self._read(root, key)
            with phase("decode"):
                sides_px = read_cuttable_sides(content)
                return decode_image(content) if sides_px is None else _ImageFile(root, key, content, (*sides_px, 3))

    def _image(self, root: str, key: str, least_px: int | None = None) -> np.ndarray:
        return self._kept((root, key, least_px), lambda: self._decoded_image(root, key, least_px))

    def _depth(self, root: str, key: str) -> DepthMap:
        return self._kept((root, key, "depth"), lambda: self._decoded_depth(root, key))

    def _kept(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        return make() if self.cache is None else self.cache.get(key, make)

    def _decoded_image(self, root: str, key: str, least_px: int | None) -> np.ndarray:
        with BlameFile(root, key):
            content = self._read(root, key)
            with phase("decode"):
                return decode_image(content, least_px)

    def _read(self, root: str, key: str) -> bytes:
        with phase("read"):
            return self.manifest.read_image(root, key)

    def _decoded_depth(self, root: str, key: str) -> DepthMap:
        with BlameFile(root, key):
            with phase("read"):
                content = self.manifest.read_depth(root, key)
            with phase("depth"):
                raw = decode_depth(content, posixpath.splitext(key)[1].lower())
                return DepthMap.from_pixels(raw, self.job.data.depth_kind)


class _Unusable(Exception):
    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{uri}: {reason}")
        self.uri, self.reason = uri, reason


@dataclass(frozen=True)
class _ImageFile:
    """An image in its file, decoded when a region is cut out of it."""

    root: str
    key: str
    content: bytes
    shape: tuple[int, int, int]

    def __getitem__(self, region: tuple[slice, slice]) -> np.ndarray:
        with BlameFile(self.root, self.key), phase("decode"):
            return decode_region(self.content, *region)


class BlameFile:
    """Gives a `BadImage` or `MissingFile` raised inside the name of the file that it is about.

    Any other `StorageError` passes: a store that cannot be reached says nothing about its images.
    """

    def __init__(self, root: str, key: str) -> None:
        self.uri = posixpath.join(root, key)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadImage | MissingFile):
            raise _Unusable(self.uri, str(error)) from None
