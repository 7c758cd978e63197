"""The stream: a whole run's samples as one indexed sequence, decoded and synthesised by Ray Data.

Sample `i` is image `permutation(seed, epoch)[i % n]` of each kind, `epoch = i // n`, and everything random about it
follows from `(seed, i)`. So order and content are the same at any number of workers, there is no stall where an
epoch ends, and a restarted run goes on at the sample where its checkpoint stopped.
"""

import itertools
import posixpath
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import ray
from ray.data import DataContext, DataIterator

from corun_ray.config import ColabatorJob, TrainingJob
from corun_ray.core import samples, scattering
from corun_ray.core.depth import DepthMap, procedural_depth
from corun_ray.core.images import BadImage, decode_depth, decode_image
from corun_ray.core.phases import phase
from corun_ray.service import telemetry
from corun_ray.service.decoded import Decoded, decoded_of
from corun_ray.service.manifest import Manifest
from corun_ray.service.pacing import Pause
from corun_ray.service.phases import Layout
from corun_ray.service.storage import MissingFile

T = TypeVar("T")
Kept = TypeVar("Kept", np.ndarray, DepthMap)
Batch = dict[str, np.ndarray]

CLEAR, HAZY = 0, 1
"""Which permutation and which random numbers: each kind of image has its own."""
UNLIMITED = 2**60


class TooManyBadFiles(Exception):
    """More unusable images than `data.max_bad_fraction` allows."""


@lru_cache(maxsize=4)
def permutation(seed: int, kind: int, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch, `length` int64."""
    return np.random.default_rng([seed, kind, epoch]).permutation(length)


def image_of_sample(seed: int, kind: int, index: int, length: int, attempt: int = 0) -> int:
    """Which of `length` images sample `index` uses; `attempt` > 0 names its stand-ins, should that be unusable."""
    epoch, position = divmod(index, length)
    return int(permutation(seed, kind, epoch, length)[(position + attempt) % length])


@dataclass(frozen=True)
class SampleMaker:
    """Makes the samples of one job: reads, decodes, synthesises. Pure but for the reading."""

    job: TrainingJob
    manifest: Manifest
    patch_px: int
    report_bad: Callable[[dict[str, str]], None]
    cache: Decoded | None = None

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
            image = image_of_sample(self.job.seed, kind, index, length, attempt)
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
        hazy = self._image(data.paired.hazy, hazy_key)
        clear = self._image(data.paired.clear, self.manifest.clear[image])
        with _naming(data.paired.hazy, hazy_key):
            return samples.paired_sample(
                hazy, clear, rng, patch_px=self.patch_px, random_resize=data.random_resize, rotation=data.rotation
            )

    def _synthetic(self, image: int, rng: np.random.Generator) -> samples.Pair:
        data, haze = self.job.data, self.job.haze
        assert data.clear is not None
        clear_key = self.manifest.clear[image]
        clear = self._image(data.clear, clear_key)
        if self.manifest.depth is None:
            depth_root, depth_key = data.clear, clear_key
            with phase("depth"):
                depth_map = procedural_depth(rng, *clear.shape[:2])
        else:
            assert data.depth is not None
            depth_root, depth_key = data.depth, self.manifest.depth[image]
            depth_map = self._depth(depth_root, depth_key)
        with _naming(depth_root, depth_key):
            return samples.synthetic_sample(
                clear,
                depth_map,
                rng,
                patch_px=self.patch_px,
                haze_range=scattering.HazeRange(haze.beta, haze.airlight, haze.airlight_tint),
                random_resize=data.random_resize,
                rotation=data.rotation,
            )

    def _real(self, image: int, rng: np.random.Generator, jpeg_quality: int | None) -> tuple[str, samples.RealViews]:
        assert isinstance(self.job, ColabatorJob)
        key = self.manifest.hazy[image]
        least_px = samples.real_side_px(self.patch_px)
        hazy = self._image(self.job.data.hazy, key, least_px)
        return key, samples.real_views(hazy, rng, patch_px=self.patch_px, jpeg_quality=jpeg_quality)

    def _image(self, root: str, key: str, least_px: int | None = None) -> np.ndarray:
        return self._kept((root, key, least_px), lambda: self._decoded_image(root, key, least_px))

    def _depth(self, root: str, key: str) -> DepthMap:
        return self._kept((root, key, "depth"), lambda: self._decoded_depth(root, key))

    def _kept(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        return make() if self.cache is None else self.cache.get(key, make)

    def _decoded_image(self, root: str, key: str, least_px: int | None) -> np.ndarray:
        with _naming(root, key):
            with phase("read"):
                content = self.manifest.read_image(root, key)
            with phase("decode"):
                return decode_image(content, least_px)

    def _decoded_depth(self, root: str, key: str) -> DepthMap:
        with _naming(root, key):
            with phase("read"):
                content = self.manifest.read_depth(root, key)
            with phase("depth"):
                raw = decode_depth(content, posixpath.splitext(key)[1].lower())
                return DepthMap.of(raw, self.job.data.depth_kind)


class _Unusable(Exception):
    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{uri}: {reason}")
        self.uri, self.reason = uri, reason


class _naming:
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


@lru_cache(maxsize=2)
def _fetched(manifest: Any) -> Manifest:
    """The manifest behind a reference, once a process."""
    return ray.get(manifest)


def _make_samples(
    batch: Batch,
    job: TrainingJob,
    manifest: Any,
    board: Any,
    layout: Layout,
    patch_px: int,
    labels: Mapping[str, str],
    cache: Any,
) -> Batch:
    import cv2

    # Ray already runs one task a core; OpenCV's own threads would only fight over it.
    cv2.setNumThreads(1)
    recorder, started_s = telemetry.Recorder(labels), time.perf_counter()
    decoded = None if cache is None else decoded_of(cache)
    if decoded is not None:
        decoded.refresh()
    make = SampleMaker(job, _fetched(manifest), patch_px, board.report_bad.remote, decoded)
    made = make({"id": layout.samples(batch["id"])})
    recorder.add(telemetry.SAMPLES, len(batch["id"]))
    recorder.add(telemetry.SAMPLE_SECONDS, time.perf_counter() - started_s)
    return made


def split_stream(
    job: TrainingJob,
    manifest: Any,
    board: Any,
    layout: Layout,
    patch_px: int,
    labels: Mapping[str, str] = telemetry.NO_JOB,
    cache: Any = None,
) -> list[DataIterator]:
    """The stream of one phase, as `layout` cuts it, in patches of `patch_px`; one iterator a worker.

    `labels` are those of the job's metrics, `cache` is its keeper of decoded images, if it has one.
    """
    DataContext.get_current().enable_progress_bars = False
    rows = ray.data.range(layout.num_blocks * layout.rows_per_block, override_num_blocks=layout.num_blocks)
    dataset = rows.map_batches(
        _make_samples,  # type: ignore[arg-type]  # the stubs know no keyword arguments
        batch_size=None,
        fn_kwargs={
            "job": job,
            "manifest": manifest,
            "board": board,
            "layout": layout,
            "patch_px": patch_px,
            "labels": labels,
            "cache": cache,
        },
    )
    # Ray would cut a block that it finds too large, and the ranks would get each other's samples.
    dataset.context.target_max_block_size = UNLIMITED
    dataset.context.custom_execution_callback_classes = [Pause]
    # What the training workers have, Ray Train has told Ray Data, which leaves it to them.
    dataset.context.execution_options.preserve_order = True
    return dataset.streaming_split(layout.num_workers, equal=True)


def batches(shard: DataIterator, layout: Layout, rank: int) -> Iterator[Batch]:
    """One rank's batches of a phase, a step each; raises RuntimeError should the stream ever come out of order."""
    taken = shard.iter_batches(batch_size=layout.batch, batch_format="numpy", prefetch_batches=2)
    for step, batch in enumerate(itertools.islice(taken, layout.num_steps)):
        expected = layout.first_sample + (step * layout.num_workers + rank) * layout.batch
        if batch["index"].tolist() != list(range(expected, expected + layout.batch)):
            raise RuntimeError(f"rank {rank} was given samples {batch['index'].tolist()}, expected {expected} ...")
        yield batch
