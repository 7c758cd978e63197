"""The sample stream: all samples of a run as one indexed sequence, decoded and synthesised by Ray Data.

Sample `i` follows from the job and `i` alone (see `sample_maker`). So order and content are the same at any number of
workers, no step waits where an epoch ends, and a restarted run resumes at the sample where its checkpoint stopped.
With `data.synthesis: worker` the stream decodes and draws, and the pixel work is the learner's.

A run is cut into phases of one patch and batch size, and each phase into the blocks of a Ray Data dataset.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
import ray
from ray.actor import ActorProxy
from ray.data import DataContext, DataIterator
from ray.data._internal.execution.execution_callback import ExecutionCallback

from corun_ray.config.jobs import PretrainJob, TrainingJob
from corun_ray.service.data.cache import CacheKeeper, NoticeBoard, get_cache_view
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.data.sample_maker import Batch, SampleMaker
from corun_ray.service.telemetry.prometheus import NO_JOB, SAMPLE_SECONDS, SAMPLES, MetricRecorder

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

STEPS_PER_BLOCK = 16
"""Steps that a block lasts: few blocks to schedule, and yet the first block is done early."""
DRAWN_STEPS_PER_BLOCK = 4
"""The same for samples whose pixel work the workers do: their regions are several times as large as patches."""
MAX_BLOCKS = 20_000
"""Ray Data plans every block before it runs the first, so a longer run has longer blocks instead of more."""
UNLIMITED_BLOCK_BYTES = 2**60
PREFETCHED_BATCHES = 2

MAX_IDLE_LOOK_S = 0.01
"""A look of Ray Data's executor that takes less has waited for nothing."""
MIN_IDLE_LOOKS = 20
"""Idle looks in a row before the executor is paused: when a task ends and another begins, there are fewer."""
PAUSE_S = 0.05


# --- Phases and blocks ---


@dataclass(frozen=True)
class StreamPhase:
    """The steps from `first_step` up to, not including, `end_step`: all of one patch and batch size."""

    first_step: int
    end_step: int
    patch_px: int
    batch: int
    """Images of each kind (synthetic, real) that one worker sees per optimizer step."""


def plan_phases(job: TrainingJob) -> list[StreamPhase]:
    """Return the phases of a whole run.

    There is one, unless `train.progressive` adds later ones.
    """
    # The first step, patch size and batch per worker of each phase.
    starts = [(0, job.data.patch_px, job.train.batch_per_worker)]
    if isinstance(job, PretrainJob):
        starts += [(later.from_step, later.patch_px, later.batch_per_worker) for later in job.train.progressive]

    # A phase ends where the next one starts; the last one ends with the run.
    ends = [first_step for first_step, _, _ in starts[1:]]
    ends.append(job.train.steps)

    plan_phases = []
    for (first_step, patch_px, batch_per_worker), next_step in zip(starts, ends, strict=True):
        # A phase that would start at or after the last step has no steps, and is skipped.
        end_step = min(next_step, job.train.steps)
        if first_step < end_step:
            plan_phases.append(StreamPhase(first_step, end_step, patch_px, batch_per_worker * job.train.accumulate))

    return plan_phases


@dataclass(frozen=True)
class BlockLayout:
    """How (the rest of) a phase is cut into blocks, so that each rank gets its own samples in order.

    Each step takes the next `batch * num_workers` samples, and rank r the r-th `batch` of them. A block holds one
    rank's share of several consecutive steps: with a block for each step, Ray Data would be busier with blocks than
    with images. Block `j` belongs to rank `j % num_workers`, since the splitter deals ordered, equal blocks in turn.
    """

    first_sample: int
    num_steps: int
    batch: int
    num_workers: int
    wanted_steps: int = STEPS_PER_BLOCK
    """Steps that a block is to last."""

    @property
    def blocks_per_worker(self) -> int:
        """Number of blocks that each rank reads."""
        wanted = -(-self.num_steps // self.wanted_steps)
        return min(wanted, max(1, MAX_BLOCKS // self.num_workers))

    @property
    def steps_per_block(self) -> int:
        """Number of steps that a block lasts.

        The last block may hold some that no step takes.
        """
        return -(-self.num_steps // self.blocks_per_worker)

    @property
    def rows_per_block(self) -> int:
        """Number of samples in a block."""
        return self.steps_per_block * self.batch

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all ranks."""
        return self.blocks_per_worker * self.num_workers

    def map_rows_to_samples(self, rows: np.ndarray) -> np.ndarray:
        """Map row numbers of the dataset to sample indices.

        Sample indices count over the run's whole stream.
        """
        # Row number → block, step within the block, position within the step's batch.
        block, row = np.divmod(rows, self.rows_per_block)
        step, position = np.divmod(row, self.batch)

        # Block → rank, and how many blocks of that rank came before.
        blocks_before, rank = np.divmod(block, self.num_workers)
        step = blocks_before * self.steps_per_block + step
        return self.first_sample + (step * self.num_workers + rank) * self.batch + position


def plan_remaining_phases(
    job: TrainingJob, step: int, num_images_seen: int, num_workers: int
) -> list[tuple[StreamPhase, BlockLayout]]:
    """Return the phases left after `step`, with their layouts.

    `num_images_seen` are the samples taken so far. The count runs on across phases, so a run that restarts within a
    phase resumes at the next sample. The list is empty at the end of the run.
    """
    remaining = []
    first_sample = num_images_seen
    wanted_steps = DRAWN_STEPS_PER_BLOCK if job.data.synthesis == "worker" else STEPS_PER_BLOCK
    for phase in plan_phases(job):
        num_steps = phase.end_step - max(step, phase.first_step)
        if num_steps > 0:
            layout = BlockLayout(first_sample, num_steps, phase.batch, num_workers, wanted_steps)
            remaining.append((phase, layout))
            first_sample += num_steps * phase.batch * num_workers

    return remaining


# --- Ray Data ---


class DisorderedStream(RuntimeError):
    """Samples that Ray Data gave to another rank, or in another order."""


@dataclass(frozen=True)
class StreamTask:
    """What Ray Data's tasks need to make the samples of one phase."""

    job: TrainingJob
    manifest: "ray.ObjectRef[Manifest]"
    board: NoticeBoard
    layout: BlockLayout
    patch_px: int
    labels: Mapping[str, str] = field(default_factory=NO_JOB.copy)
    """Labels of the job's metrics."""
    cache: ActorProxy[CacheKeeper] | None = None
    """The keeper of decoded images; None for a job without a cache."""


def split_stream(task: StreamTask) -> list[DataIterator]:
    """Build a phase's stream; return one iterator per worker."""
    # One row for each sample, and as many read tasks as the layout has blocks.
    layout = task.layout
    DataContext.get_current().enable_progress_bars = False
    rows = ray.data.range(layout.num_blocks * layout.rows_per_block, override_num_blocks=layout.num_blocks)
    dataset = rows.map_batches(
        _make_samples,  # type: ignore[arg-type]  # the stubs know no keyword arguments
        batch_size=None,
        fn_kwargs={"task": task},
    )

    # Ray Data would cut a block that it finds too large, and the ranks would get each other's samples.
    dataset.context.target_max_block_size = UNLIMITED_BLOCK_BYTES
    dataset.context.execution_options.preserve_order = True
    dataset.context.custom_execution_callback_classes = [IdlePause]

    # Resources need no limits here: Ray Train tells Ray Data which ones its workers hold.
    return dataset.streaming_split(layout.num_workers, equal=True)


def _make_samples(batch: Batch, task: StreamTask) -> Batch:
    """Make the samples of a block.

    `batch` holds the row numbers as `id`.
    """
    # Ray runs one task per core already; OpenCV's own threads would only compete with them.
    cv2.setNumThreads(1)
    recorder = MetricRecorder(task.labels)
    started_s = time.perf_counter()

    # The node's cache of decoded images, with what other tasks have added since the last block.
    cache_view = None
    if task.cache is not None:
        cache_view = get_cache_view(task.cache)  # type: ignore[arg-type]  # a handle is hashable
        cache_view.refresh()

    manifest = _fetch_manifest(task.manifest)
    make_batch = SampleMaker(task.job, manifest, task.patch_px, task.board.report_bad.remote, cache_view)
    samples = make_batch({"id": task.layout.map_rows_to_samples(batch["id"])})

    recorder.add(SAMPLES, len(batch["id"]))
    recorder.add(SAMPLE_SECONDS, time.perf_counter() - started_s)
    return samples


@lru_cache(maxsize=2)
def _fetch_manifest(manifest: "ray.ObjectRef[Manifest]") -> Manifest:
    """Fetch the manifest behind a reference, once per process."""
    return ray.get(manifest)


def iterate_batches(shard: DataIterator, layout: BlockLayout, rank: int) -> Iterator[Batch]:
    """Yield one rank's batches of a phase, step by step.

    Raises `DisorderedStream` where the samples are not those that the layout gives to this rank.
    """
    loader = shard.iter_batches(batch_size=layout.batch, batch_format="numpy", prefetch_batches=PREFETCHED_BATCHES)

    # The last block may hold more steps than the phase has.
    for step, batch in enumerate(itertools.islice(loader, layout.num_steps)):
        # A wrong order would train on other samples without any other sign, so check it at every step.
        first = layout.first_sample + (step * layout.num_workers + rank) * layout.batch
        given = batch["index"].tolist()
        if given != list(range(first, first + layout.batch)):
            raise DisorderedStream(f"rank {rank} was given samples {given}, expected {first} ...")

        yield batch


class IdlePause(ExecutionCallback):
    """Pauses Ray Data's executor between its looks for work while there is none.

    Where the stream is ahead of the training, as it should be, the executor (Ray 2.60) looks again and again whether
    it may start a task, without a pause: that takes a whole core from decoding or training. While tasks run, it waits
    for them by itself. It calls `on_execution_step` after every look, which is where it can be made to wait.
    """

    def __init__(self) -> None:
        self._idle_looks = 0
        self._since_s = time.monotonic()

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        """Pause after many idle looks in a row.

        Ray Data calls this after each look.
        """
        was_idle = time.monotonic() - self._since_s < MAX_IDLE_LOOK_S
        self._idle_looks = self._idle_looks + 1 if was_idle else 0
        if self._idle_looks > MIN_IDLE_LOOKS:
            time.sleep(PAUSE_S)
        self._since_s = time.monotonic()
