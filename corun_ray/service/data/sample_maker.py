"""Training samples of a job, each by its index in the run's stream: which images it takes, and how it is made.

Sample `i` takes image `permutation(seed, epoch)[i % n]` of each kind (clear, hazy), with `epoch = i // n`. Everything
random about the sample follows from `(seed, i)`.
"""

import io
import math
import posixpath
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.core.data.augment import CAMERA_FAULTS, Sliceable, draw_jpeg_quality
from corun_ray.core.data.depth import DepthMap, draw_procedural_depth
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.images import (
    MIN_SIDE_PX,
    decode_depth,
    decode_image,
    has_jpeg_end,
    is_jpeg,
    limit_jpeg_height,
)
from corun_ray.core.data.samples import (
    DrawnPair,
    DrawnViews,
    Pair,
    RealViews,
    compute_real_side_px,
    crop_pair,
    draw_real_views,
    draw_synthetic_pair,
    make_real_views,
    make_synthetic_pair,
)
from corun_ray.core.timing import phase
from corun_ray.service.data.cache import CacheView, Decoded
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.data.unusable import BlameFile, UnusableFile, join_first_reasons

CLEAR, HAZY = 0, 1
"""Kinds of images; each has its own permutations and random numbers."""

UPRIGHT = 1
"""EXIF orientation of a photograph that needs no turning."""
CONTEXT_ROWS = 16
"""Rows kept below a region: the pixels of its last rows are interpolated from them."""
MAX_PX = 2**30
"""OpenCV decodes no larger image. A region of one costs little, but arrays of the image's shape are allocated too."""

PAIR, STRONG = "drawn_pair", "strong_draw"
"""Columns of a batch whose pixel work is left to the training worker: what was drawn for it."""
OBJECT_COLUMNS = ("key", PAIR, STRONG)
"""Columns of a batch that hold no arrays."""

Made = TypeVar("Made")
Batch = dict[str, np.ndarray]


class TooManyBadFiles(Exception):
    """More unusable images than `data.max_bad_fraction` allows."""


# --- Which image a sample takes ---


@lru_cache(maxsize=4)
def draw_permutation(seed: int, kind: int, epoch: int, length: int) -> np.ndarray:
    """Draw the order of an epoch's images, `length` int64."""
    return np.random.default_rng([seed, kind, epoch]).permutation(length)


def choose_image(seed: int, kind: int, index: int, length: int, attempt: int = 0) -> int:
    """Return which of `length` images sample `index` takes.

    `attempt` > 0 gives its substitutes where that image is unusable: the next ones of the epoch's order.
    """
    epoch, position = divmod(index, length)
    return int(draw_permutation(seed, kind, epoch, length)[(position + attempt) % length])


# --- How a sample is made ---


@dataclass(frozen=True)
class SampleMaker:
    """Makes the samples of one job: reads, decodes, synthesises. Deterministic, given the files."""

    job: TrainingJob
    manifest: Manifest
    patch_px: int
    report_bad: Callable[[dict[str, str]], None]
    """Receives every unusable image: URI → reason."""
    cache: CacheView | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Make the samples with the indices `id` (shape B).

        Returns `index` (B), `hazy` and `clear` (B H W C, RGB uint8); for Colabator also `weak` and `strong`
        (B H W C, RGB uint8) and `key` (B); for a job that learns from the true transmission also `transmission`
        (B H W, uint8).

        With `data.synthesis: worker`, `drawn_pair` (B, `DrawnPair`) takes the place of `hazy`, `clear` and
        `transmission`, and `strong_draw` (B, `StrongDraw`) that of `strong`.
        """
        rows = [self.sample(int(index)) for index in batch["id"]]

        # Stack the images of all samples; keys and what was drawn stay objects.
        columns: Batch = {"index": batch["id"]}
        for name in rows[0]:
            values = [row[name] for row in rows]
            columns[name] = np.array(values, dtype=object) if name in OBJECT_COLUMNS else np.stack(values)

        return columns

    def sample(self, index: int) -> dict[str, Any]:
        """Make one sample of the stream."""
        pair = self._make_from_usable(CLEAR, index, len(self.manifest.clear), self._make_pair)
        row: dict[str, Any]
        if isinstance(pair, DrawnPair):
            row = {PAIR: pair}
        else:
            row = {"hazy": pair.hazy, "clear": pair.clear}
            if pair.transmission is not None:
                row["transmission"] = pair.transmission

        if isinstance(self.job, ColabatorJob):
            # The real image of a sample goes through JPEG exactly when the synthetic one does.
            def make_real(image: int, rng: np.random.Generator) -> tuple[str, RealViews | DrawnViews]:
                return self._make_real_views(image, rng, compress=pair.jpeg_quality is not None)

            key, views = self._make_from_usable(HAZY, index, len(self.manifest.hazy), make_real)
            row |= {"weak": views.weak, "key": key}
            row[STRONG if isinstance(views, DrawnViews) else "strong"] = views.strong

        return row

    def _make_from_usable(
        self, kind: int, index: int, length: int, make: Callable[[int, np.random.Generator], Made]
    ) -> Made:
        """Make the sample from its image or a usable substitute.

        Raises `TooManyBadFiles` where none of the images can be used.
        """
        reasons: dict[str, str] = {}
        for attempt in range(length):
            image = choose_image(self.job.seed, kind, index, length, attempt)
            try:
                return make(image, np.random.default_rng([self.job.seed, kind, index, attempt]))
            except UnusableFile as error:
                self.report_bad({error.uri: error.reason})
                reasons[error.uri] = error.reason

        # Name what the images come with: the fault may lie there.
        name = "hazy images"
        if kind == CLEAR:
            name = "pairs" if self.job.data.paired else "clear images"
            name += " with their depth maps" if self.manifest.depth is not None else ""
        raise TooManyBadFiles(f"not one of the {length} {name} can be used; the first: {join_first_reasons(reasons)}")

    def _make_pair(self, image: int, rng: np.random.Generator) -> Pair | DrawnPair:
        """Make a clear patch and its hazy counterpart.

        The haze is synthetic, unless the job has paired data.
        """
        if self.job.data.paired is None:
            return self._make_synthetic_pair(image, rng)
        return self._make_recorded_pair(image, rng)

    def _make_recorded_pair(self, image: int, rng: np.random.Generator) -> Pair:
        """Cut the same patch out of both images of a pair."""
        data = self.job.data
        assert data.paired is not None and self.manifest.paired_hazy is not None
        hazy_key = self.manifest.paired_hazy[image]
        hazy = self._open_image(data.paired.hazy, hazy_key)
        clear = self._open_image(data.paired.clear, self.manifest.clear[image])

        # Images of two sizes are no pair: the degraded one is named as unusable.
        with BlameFile(data.paired.hazy, hazy_key):
            return crop_pair(
                hazy,
                clear,
                rng,
                patch_px=self.patch_px,
                random_resize=data.random_resize,
                rotation=data.rotation,
                resize=data.resize,
                crop_truth=data.paired.crop_truth,
            )

    def _make_synthetic_pair(self, image: int, rng: np.random.Generator) -> Pair | DrawnPair:
        """Cut a patch out of a clear image and add haze, or only draw it for the training worker."""
        data, haze = self.job.data, self.job.haze
        assert data.clear is not None
        clear_key = self.manifest.clear[image]
        clear = self._open_image(data.clear, clear_key)

        # The depth map of the image, or a procedural one where the job names none.
        if self.manifest.depth is None:
            depth_root, depth_key = data.clear, clear_key
            with phase("depth"):
                depth_map = draw_procedural_depth(rng, clear.shape[0], clear.shape[1])
        else:
            assert data.depth is not None
            depth_root, depth_key = data.depth, self.manifest.depth[image]
            depth_map = self._load_depth(depth_root, depth_key)

        make: Callable[..., Pair | DrawnPair] = draw_synthetic_pair
        if data.synthesis == "stream":
            make = partial(make_synthetic_pair, with_transmission=self.job.loss.transmission > 0)

        # A depth map that does not fit its image is named as unusable.
        with BlameFile(depth_root, depth_key):
            return make(
                clear,
                depth_map,
                rng,
                patch_px=self.patch_px,
                haze_range=HazeRange(**haze.model_dump()),
                random_resize=data.random_resize,
                rotation=data.rotation,
                camera_faults=CAMERA_FAULTS[data.camera],
                resize=data.resize,
            )

    def _make_real_views(
        self, image: int, rng: np.random.Generator, *, compress: bool
    ) -> tuple[str, RealViews | DrawnViews]:
        """Make the weak and strong view of a real image, or only draw the strong one for the training worker.

        With `compress`, the photograph goes through JPEG first. Also returns the image's key.
        """
        assert isinstance(self.job, ColabatorJob)
        data, key = self.job.data, self.manifest.hazy[image]
        least_px, quality = compute_real_side_px(self.patch_px, data.resize), None

        # A photograph that is to be compressed is decoded whole, others only as large as the patch needs.
        if compress:
            least_px = None
            quality = draw_jpeg_quality(rng, CAMERA_FAULTS[data.camera])
        hazy = self._load_image(data.hazy, key, least_px)
        make: Callable[..., RealViews | DrawnViews]
        make = make_real_views if data.synthesis == "stream" else draw_real_views
        return key, make(hazy, rng, patch_px=self.patch_px, jpeg_quality=quality, resize=data.resize)

    def _open_image(self, root: str, key: str) -> Sliceable:
        """Open an image to cut a region out of it.

        Where it can, only the region is decoded. With a cache the whole image is: the cache keeps whole images.
        """
        if self.cache is not None:
            return self._load_image(root, key)

        with BlameFile(root, key):
            content = self._read_image(root, key)
            with phase("decode"):
                sides_px = read_cuttable_sides(content)
                if sides_px is None:
                    return decode_image(content)

                return _ImageFile(root, key, content, (*sides_px, 3))

    def _load_image(self, root: str, key: str, least_px: int | None = None) -> np.ndarray:
        """Return a whole image, decoded or from the cache.

        Shape `H W C`, RGB uint8.

        With `least_px`, a JPEG may be decoded to a smaller size whose sides are still that long.
        """

        def decode() -> np.ndarray:
            with BlameFile(root, key):
                content = self._read_image(root, key)
                with phase("decode"):
                    return decode_image(content, least_px)

        return self._get_cached(root, (key, least_px), decode)

    def _load_depth(self, root: str, key: str) -> DepthMap:
        """Return a depth map, decoded or from the cache."""

        def decode() -> DepthMap:
            with BlameFile(root, key):
                with phase("read"):
                    content = self.manifest.read_depth(root, key)

                with phase("depth"):
                    raw = decode_depth(content, posixpath.splitext(key)[1].lower())
                    return DepthMap.from_pixels(raw, self.job.data.depth_kind)

        return self._get_cached(root, (key, self.job.data.depth_kind), decode)

    def _get_cached(self, root: str, key: Hashable, decode: Callable[[], Decoded]) -> Decoded:
        """Return what the cache holds of a data root as it was listed, else what `decode` returns."""
        if self.cache is None:
            return decode()
        return self.cache.get((root, self.manifest.versions[root], key), decode)

    def _read_image(self, root: str, key: str) -> bytes:
        """Read an image's file."""
        with phase("read"):
            return self.manifest.read_image(root, key)


# --- Regions of JPEG files ---


@dataclass(frozen=True)
class _ImageFile:
    """An encoded image that is decoded only when a region is cut out of it."""

    root: str
    key: str
    content: bytes
    shape: tuple[int, int, int]

    def __getitem__(self, region: tuple[slice, slice]) -> np.ndarray:
        with BlameFile(self.root, self.key), phase("decode"):
            return decode_region(self.content, *region)


def read_cuttable_sides(data: bytes) -> tuple[int, int] | None:
    """Return height and width in pixels of a cuttable JPEG.

    `decode_region` can cut regions out of it. Returns None for other files.

    That is every complete JPEG of three colours of 8 bits that its EXIF orientation does not turn. Others are decoded
    as a whole.
    """
    if not is_jpeg(data) or not has_jpeg_end(data):
        return None

    # A damaged header makes Pillow raise errors of any kind; decoding the whole file names the damage.
    try:
        file = JpegImageFile(io.BytesIO(data))
        if file.mode != "RGB" or file.getexif().get(Base.Orientation, UPRIGHT) != UPRIGHT:
            return None
    except Exception:
        return None

    sides_px = file.height, file.width
    is_supported = min(sides_px) >= MIN_SIDE_PX and math.prod(sides_px) <= MAX_PX
    return sides_px if is_supported else None


def decode_region(data: bytes, rows: slice, columns: slice) -> NDArray[np.uint8]:
    """Decode a region of a JPEG to `H W C`, RGB uint8.

    The rows below the region cost no work.

    The pixels are those of `decode_image`. OpenCV decodes a file only whole, and so does Pillow; but Pillow stays
    silent where a header that promises fewer rows than there are leaves coded data over.

    Raises `BadImage` as `decode_image` does, except for damage below the region.
    """
    try:
        file = JpegImageFile(io.BytesIO(limit_jpeg_height(data, rows.stop + CONTEXT_ROWS)))
        return np.asarray(file.crop((columns.start, rows.start, columns.stop, rows.stop)))
    except OSError:
        # Where Pillow fails, OpenCV decides whether the file is damaged, as for every other file.
        return decode_image(data)[rows, columns]
