"""Define the figures of `bench pool`, with their units, and summarise measurements to figures.

Pure: no process, no storage. The fields of the report are the keys of its JSON file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from corun_ray.core.choices import Encoding

STEP_S = 0.3
"""Seconds of a step of the simulated job."""
LATE_SHARE_OF_STEP = 0.1
"""A step that begins later than this share of a step after its time counts as late."""
MIN_LEVEL_LABELS = 20


@dataclass(frozen=True)
class PoolSettings:
    """The labels, the pools and the simulated job of a measurement."""

    labels: int
    side_px: int
    shards: tuple[int, ...]
    encoding: Encoding
    memory_mib: int
    """Memory for the labels of all shards together. Beyond it, labels that are saved leave memory."""
    workers: int
    """Workers of the simulated job."""
    job_s: float = 20.0
    """Duration of the simulated job."""

    @property
    def label_bytes(self) -> int:
        """Bytes of one label's images: four planes."""
        return 4 * self.side_px**2 * np.dtype(self.encoding).itemsize


@dataclass(frozen=True)
class Latency:
    """Durations of one action, over `samples` repetitions."""

    samples: int
    median_ms: float
    mean_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Reads:
    """Reads of random labels: their rate in small batches, and the latency of single ones."""

    labels_per_s: float
    one: Latency


@dataclass(frozen=True)
class Save:
    """A snapshot: `freeze` delays the step, `finish` runs beside the training."""

    freeze_s: float = 0.0
    finish_s: float = 0.0
    written_bytes: int = 0

    def __add__(self, other: "Save") -> "Save":
        """Return both saves, one after the other."""
        return Save(
            self.freeze_s + other.freeze_s, self.finish_s + other.finish_s, self.written_bytes + other.written_bytes
        )


@dataclass(frozen=True)
class Restore:
    """The restoration of a snapshot by a new set of shards."""

    start_s: float
    """Until the new processes answer."""
    index_s: float
    """From then until they know every label."""
    first_read_labels: int
    first_read_s: float
    """One read of so many labels, none of them in memory yet."""


@dataclass(frozen=True)
class Memory:
    """Memory per label of the pool, whether the label is in memory or not."""

    counted_bytes_per_label: float
    """By the pool's own counters."""
    object_store_bytes_per_label: float
    """Growth of Ray's object store."""
    index_bytes_per_label: float
    """Growth of the private memory of the shards' processes."""


@dataclass(frozen=True)
class Level:
    """All measurements with a certain number of labels in the pool."""

    labels: int
    offers_per_s: float
    """Rate since the level before."""
    offer: Latency
    """From an offer to its answer, while all clients offer."""
    memory: Memory
    from_memory: Reads
    from_storage: Reads
    full_save: Save
    """The sum of all rounds so far."""
    small_save: Save
    """After a small share of the labels has been replaced."""
    restore: Restore


@dataclass(frozen=True)
class WorkerWaits:
    """Steps of a simulated job whose workers share the pool."""

    worker_steps: int
    blocked: Latency
    """Time that the pool blocks one worker in one step."""
    blocked_share_of_step: float
    worker_cpu_s_per_step: float
    """Processor time of the worker's own thread within the blocked time: what remains if every worker has its own
    core."""
    late_share_of_steps: float
    """Share of the steps that began late: the machine was too slow for them."""
    shard_cpu_s_per_step: float
    """Processor time of all shards for one step of all workers."""


@dataclass(frozen=True)
class Series:
    """The measurements of one number of shards."""

    shards: int
    levels: tuple[Level, ...]
    job: WorkerWaits
    """Workers begin their steps at different times and read labels in memory."""
    job_in_lockstep: WorkerWaits
    """All workers begin their steps at once."""
    job_beyond_memory: WorkerWaits | None
    """Workers read any labels, at different times; None where all labels are in memory."""


@dataclass(frozen=True)
class PoolReport:
    """The results of a whole run of `bench pool`."""

    settings: PoolSettings
    machine: Mapping[str, str | float]
    wall_s: float
    series: tuple[Series, ...]


class Tick(NamedTuple):
    """One step of one simulated worker."""

    blocked_s: float
    """Time in calls of the pool; without a pool the step would be shorter by this time."""
    cpu_s: float
    """Processor time of the worker's thread within these calls."""
    late_s: float
    """Delay of the step's begin."""


def list_levels(labels: int) -> list[int]:
    """Return the levels at which to measure a pool.

    These are 1, 3, 10, 30 and so on within the last two decades, and `labels` itself.
    """
    levels = []
    for decade in range(1, 12):
        for first in (1, 3):
            level = first * 10**decade
            if max(MIN_LEVEL_LABELS, labels / 100) <= level <= labels / 1.5:
                levels.append(level)
    return [*levels, labels]


def summarise_latency(durations_s: Sequence[float]) -> Latency:
    """Return the median, the mean and the 99th percentile of durations.

    Raises `ValueError` where there are none.
    """
    if not durations_s:
        raise ValueError("no samples")

    times_ms = np.array(durations_s) * 1000
    median_ms, p99_ms = np.percentile(times_ms, [50, 99]).tolist()
    return Latency(len(durations_s), median_ms, float(times_ms.mean()), p99_ms)


def summarise_job(ticks: Sequence[Tick], steps: int, shard_cpu_s: float) -> WorkerWaits:
    """Return the figures of a simulated job.

    Each worker took `steps` steps.

    Raises `ValueError` where there are no ticks.
    """
    # Waits are those of a worker in a step; a shard's time is that of a step of all workers.
    blocked = summarise_latency([tick.blocked_s for tick in ticks])
    late_steps = sum(tick.late_s > LATE_SHARE_OF_STEP * STEP_S for tick in ticks)
    return WorkerWaits(
        worker_steps=len(ticks),
        blocked=blocked,
        blocked_share_of_step=blocked.mean_ms / 1000 / STEP_S,
        worker_cpu_s_per_step=sum(tick.cpu_s for tick in ticks) / len(ticks),
        late_share_of_steps=late_steps / len(ticks),
        shard_cpu_s_per_step=shard_cpu_s / steps,
    )
