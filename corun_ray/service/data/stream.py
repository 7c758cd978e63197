"""The stream: a whole run's samples as one indexed sequence, decoded and synthesised by Ray Data.

What sample `i` is follows from the job and `i` alone (`samplemaker`). So order and content are the same at any number
of workers, there is no stall where an epoch ends, and a restarted run goes on at the sample where its checkpoint
stopped.


How a run's stream is cut: into phases of one patch and batch size, and each phase into Ray Data's blocks.

Ray Data's scheduler, kept from spinning.

Where the stream is ahead of the training, as it should be, Ray Data's executor (2.60) has nothing to do and looks again
and again whether that has changed, without a pause: a whole core, taken from decoding or training. While tasks run it
does wait for them. It tells a callback of every look, and that is where it can be made to wait in the other case, too.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.data import DataContext, DataIterator
from ray.data._internal.execution.execution_callback import ExecutionCallback

from corun_ray.config.jobs import PretrainJob, TrainingJob
from corun_ray.service.data.cache import decoded_of
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.data.sample_maker import Batch, SampleMaker
from corun_ray.service.telemetry import prometheus as telemetry

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor


STEPS_PER_BLOCK = 16
"""Steps that a block of the stream lasts: few blocks to schedule, and still an early first one."""
MAX_BLOCKS = 20_000
"""Ray Data plans every block before the first; a longer run has longer blocks."""


@dataclass(frozen=True)
class StreamPhase:
    """The steps from `first_step` up to, not including, `end_step`: all of one patch and batch size."""

    first_step: int
    end_step: int
    patch_px: int
    batch: int
    """Images of each kind in a worker's step."""


def phases(job: TrainingJob) -> list[StreamPhase]:
    """The whole run's phases: one, unless `train.progressive` names later ones."""
    later = job.train.progressive if isinstance(job, PretrainJob) else ()
    sizes = [(0, job.data.patch_px, job.train.batch_per_worker)]
    sizes += [(phase.from_step, phase.patch_px, phase.batch_per_worker) for phase in later]
    sizes = [(first_step, patch_px, batch * job.train.accumulate) for first_step, patch_px, batch in sizes]
    ends = [first_step for first_step, _, _ in sizes[1:]] + [job.train.steps]
    found = [
        StreamPhase(first, min(end, job.train.steps), *size) for (first, *size), end in zip(sizes, ends, strict=True)
    ]
    return [phase for phase in found if phase.first_step < phase.end_step]


@dataclass(frozen=True)
class BlockLayout:
    """How the stream of (the rest of) a phase is cut into blocks, so that each rank gets its own samples in order.

    Each step takes the next `batch * num_workers` samples, its r-th `batch` of them on rank r. A block
    holds one rank's share of several consecutive steps, since a block a step would keep Ray Data busier with blocks
    than with images. Block `j` is rank `j % num_workers`'s: the splitter deals ordered, equal blocks out in turn.
    """

    first_sample: int
    num_steps: int
    batch: int
    num_workers: int

    @property
    def blocks_per_worker(self) -> int:
        """Blocks that each rank will read."""
        wanted = -(-self.num_steps // STEPS_PER_BLOCK)
        return min(wanted, max(1, MAX_BLOCKS // self.num_workers))

    @property
    def steps_per_block(self) -> int:
        """Steps that a block lasts; the last one may hold a few that nobody takes."""
        return -(-self.num_steps // self.blocks_per_worker)

    @property
    def rows_per_block(self) -> int:
        """Samples in a block."""
        return self.steps_per_block * self.batch

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self.blocks_per_worker * self.num_workers

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers of the dataset → indices in the run's stream."""
        block, row = np.divmod(rows, self.rows_per_block)
        step, place = np.divmod(row, self.batch)
        turn, rank = np.divmod(block, self.num_workers)
        step = turn * self.steps_per_block + step
        return self.first_sample + (step * self.num_workers + rank) * self.batch + place


def remaining_phases(
    job: TrainingJob, step: int, num_images_seen: int, num_workers: int
) -> list[tuple[StreamPhase, BlockLayout]]:
    """What is left of the run after `step` steps and `num_images_seen` samples: phases and how each is cut.

    Samples are counted on across phases, so a restart within one goes on where the run stopped. Empty at the end.
    """
    remaining, first_sample = [], num_images_seen
    for phase in phases(job):
        num_steps = phase.end_step - max(step, phase.first_step)
        if num_steps > 0:
            layout = BlockLayout(first_sample, num_steps, phase.batch, num_workers)
            remaining.append((phase, layout))
            first_sample += num_steps * phase.batch * num_workers
    return remaining


QUICK_S = 0.01
"""A look that took less did not wait for anything."""
QUICK_LOOKS = 20
"""So many in a row are not those in which the end of a task is dealt with and another begun."""
PAUSE_S = 0.05


class Pause(ExecutionCallback):
    """Makes a pause after each look while the executor does not wait by itself."""

    def __init__(self) -> None:
        self._quick_looks = 0
        self._since_s = time.monotonic()

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Called by Ray Data."""
        was_quick = time.monotonic() - self._since_s < QUICK_S
        self._quick_looks = self._quick_looks + 1 if was_quick else 0
        if self._quick_looks > QUICK_LOOKS:
            time.sleep(PAUSE_S)
        self._since_s = time.monotonic()


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
    layout: BlockLayout,
    patch_px: int,
    labels: Mapping[str, str],
    cache: Any,
) -> Batch:
    import cv2

    # Ray already runs one task a core; OpenCV's own threads would only fight over it.
    cv2.setNumThreads(1)
    recorder, started_s = telemetry.MetricRecorder(labels), time.perf_counter()
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
    layout: BlockLayout,
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


def batches(shard: DataIterator, layout: BlockLayout, rank: int) -> Iterator[Batch]:
    """One rank's batches of a phase, a step each; raises RuntimeError should the stream ever come out of order."""
    taken = shard.iter_batches(batch_size=layout.batch, batch_format="numpy", prefetch_batches=2)
    for step, batch in enumerate(itertools.islice(taken, layout.num_steps)):
        expected = layout.first_sample + (step * layout.num_workers + rank) * layout.batch
        if batch["index"].tolist() != list(range(expected, expected + layout.batch)):
            raise RuntimeError(f"rank {rank} was given samples {batch['index'].tolist()}, expected {expected} ...")
        yield batch
