"""The stream: a whole run's samples as one indexed sequence, decoded and synthesised by Ray Data.

Sample `i` is image `permutation(seed, epoch)[i % n]` of each kind, `epoch = i // n`, and everything random about it
follows from `(seed, i)`. So order and content are the same at any number of workers, there is no stall where an
epoch ends, and a restarted run goes on at the sample where its checkpoint stopped.
"""

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import ray
from ray.data import DataContext, DataIterator, Dataset, ExecutionResources

from corun_ray.config import ColabatorJob, TrainingJob
from corun_ray.core import samples, scattering
from corun_ray.core.images import BadImage, decode_depth, decode_image
from corun_ray.service.manifest import Manifest
from corun_ray.service.storage import StorageError, locate

T = TypeVar("T")
Batch = dict[str, np.ndarray]

CLEAR, HAZY = 0, 1
"""Which permutation and which random numbers: each kind of image has its own."""
BATCHES_PER_READ = 128
"""Worker batches that one Ray Data read task covers: few tasks to plan, an early first batch."""


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
    report_bad: Callable[[dict[str, str]], None]

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
        pair = self._first_usable(CLEAR, index, len(self.manifest.clear), self._synthetic)
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

    def _synthetic(self, image: int, rng: np.random.Generator) -> samples.SyntheticPair:
        data, haze = self.job.data, self.job.haze
        clear_key = self.manifest.clear[image]
        clear = _decoded(data.clear, clear_key, decode_image)
        if self.manifest.depth is None:
            depth_root, depth_key = data.clear, clear_key
            depth = scattering.procedural_depth(rng, *clear.shape[:2])
        else:
            assert data.depth is not None
            depth_root, depth_key = data.depth, self.manifest.depth[image]
            suffix = posixpath.splitext(depth_key)[1].lower()
            raw = _decoded(depth_root, depth_key, lambda content: decode_depth(content, suffix))
            with _naming(depth_root, depth_key):
                depth = scattering.inverse_depth(raw, data.depth_kind)
        with _naming(depth_root, depth_key):
            return samples.synthetic_sample(
                clear,
                depth,
                rng,
                patch_px=data.patch_px,
                haze_range=scattering.HazeRange(haze.beta, haze.airlight, haze.airlight_tint),
                random_resize=data.random_resize,
            )

    def _real(self, image: int, rng: np.random.Generator, jpeg_quality: int | None) -> tuple[str, samples.RealViews]:
        assert isinstance(self.job, ColabatorJob)
        key = self.manifest.hazy[image]
        hazy = _decoded(self.job.data.hazy, key, decode_image)
        return key, samples.real_views(hazy, rng, patch_px=self.job.data.patch_px, jpeg_quality=jpeg_quality)


class _Unusable(Exception):
    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{uri}: {reason}")
        self.uri, self.reason = uri, reason


class _naming:
    """Gives a `BadImage` raised inside the name of the file that it is about."""

    def __init__(self, root: str, key: str) -> None:
        self.uri = posixpath.join(root, key)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadImage | StorageError):
            raise _Unusable(self.uri, str(error)) from None


def _decoded(root: str, key: str, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
    with _naming(root, key):
        return decode(locate(root).child(key).read())


@lru_cache(maxsize=2)
def _fetched(manifest: Any) -> Manifest:
    """The manifest behind a reference, once a process."""
    return ray.get(manifest)


def _make_samples(batch: Batch, job: TrainingJob, manifest: Any, board: Any, first_sample: int) -> Batch:
    import cv2

    # Ray already runs one task a core; OpenCV's own threads would only fight over it.
    cv2.setNumThreads(1)
    return SampleMaker(job, _fetched(manifest), board.report_bad.remote)({"id": batch["id"] + first_sample})


def sample_dataset(job: TrainingJob, manifest: Any, board: Any, first_sample: int, num_workers: int) -> Dataset:
    """Samples `first_sample …` to the run's end, one block a worker and step, in order."""
    batch = job.train.batch_per_worker
    total = job.train.steps * batch * num_workers
    reads = max(1, (total - first_sample) // (batch * BATCHES_PER_READ))
    indices = ray.data.range(total - first_sample, override_num_blocks=reads)
    blocks = indices.repartition(target_num_rows_per_block=batch, strict=True)
    return blocks.map_batches(
        _make_samples,  # type: ignore[arg-type]  # the stubs know no keyword arguments
        batch_size=batch,
        fn_kwargs={"job": job, "manifest": manifest, "board": board, "first_sample": first_sample},
    )


def split_stream(
    job: TrainingJob, manifest: Any, board: Any, first_sample: int, num_workers: int
) -> list[DataIterator]:
    """The stream cut into one iterator a worker: step `s` gives rank `r` the r-th batch of that step.

    Blocks are handed out in turn because they are in order and of equal length; each worker checks it.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    dataset = sample_dataset(job, manifest, board, first_sample, num_workers)
    options = dataset.context.execution_options
    options.preserve_order = True
    training = ExecutionResources(cpu=num_workers * job.cluster.cpus_per_worker)
    options.exclude_resources = options.exclude_resources.add(training)
    return dataset.streaming_split(num_workers, equal=True)


def batches(shard: DataIterator, batch_size: int, first_sample: int, rank: int, num_workers: int) -> Iterator[Batch]:
    """The batches of one rank; raises RuntimeError should the stream ever come out of order."""
    expected = first_sample + rank * batch_size
    for batch in shard.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=2, drop_last=True):
        if batch["index"].tolist() != list(range(expected, expected + batch_size)):
            raise RuntimeError(f"rank {rank} was given samples {batch['index'].tolist()}, expected {expected} …")
        expected += batch_size * num_workers
        yield batch
