"""The stream: a whole run's samples as one indexed sequence, decoded and synthesised by Ray Data.

What sample `i` is follows from the job and `i` alone (`samplemaker`). So order and content are the same at any number
of workers, there is no stall where an epoch ends, and a restarted run goes on at the sample where its checkpoint
stopped.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import ray
from ray.data import DataContext, DataIterator

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.data.cache import decoded_of
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.data.pacing import Pause
from corun_ray.service.data.phases import Layout
from corun_ray.service.data.sample_maker import Batch, SampleMaker
from corun_ray.service.telemetry import prometheus as telemetry

UNLIMITED = 2**60


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
