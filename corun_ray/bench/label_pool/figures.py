"""What `bench pool` finds out: its figures, with their units, and how they are summed up. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from corun_ray.core.choices import Encoding

STEP_S = 0.3
"""A step of the simulated job."""
LATE_SHARE_OF_STEP = 0.1
MIN_LEVEL = 20


@dataclass(frozen=True)
class PoolSettings:
    """What is measured."""

    labels: int
    side_px: int
    shards: tuple[int, ...]
    encoding: Encoding
    memory_mib: int
    """For labels, of all shards together; beyond it, what is saved leaves memory."""
    workers: int
    """Of the simulated job."""
    job_s: float = 20.0
    """How long that job runs."""

    @property
    def label_bytes(self) -> int:
        """Of one label's images: four planes."""
        return 4 * self.side_px**2 * np.dtype(self.encoding).itemsize


@dataclass(frozen=True)
class Latency:
    """How long one thing took, over `samples` times."""

    samples: int
    median_ms: float
    mean_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Reads:
    """Reading random labels: as fast as they come, a few in one read, and one by one."""

    labels_per_s: float
    one: Latency


@dataclass(frozen=True)
class Save:
    """A snapshot: `freeze` holds up the step, `finish` runs beside the training."""

    freeze_s: float = 0.0
    finish_s: float = 0.0
    written_bytes: int = 0

    def __add__(self, other: "Save") -> "Save":
        """Both, one after the other."""
        return Save(
            self.freeze_s + other.freeze_s, self.finish_s + other.finish_s, self.written_bytes + other.written_bytes
        )


@dataclass(frozen=True)
class Restore:
    """A new set of shards that takes over a snapshot."""

    start_s: float
    """Until the new processes answer."""
    index_s: float
    """From then until they know every label."""
    first_read_labels: int
    first_read_s: float
    """One read of so many labels, none of them in memory yet."""


@dataclass(frozen=True)
class Memory:
    """For each label of the pool, whether it is in memory or not."""

    counted_bytes_per_label: float
    """By the pool's own counters."""
    object_store_bytes_per_label: float
    """By which Ray's object store has grown."""
    index_bytes_per_label: float
    """By which the private memory of the shards' processes has grown."""


@dataclass(frozen=True)
class Level:
    """Everything measured with so many labels in the pool."""

    labels: int
    offers_per_s: float
    """Since the level before."""
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
    """By the pool, of one worker in one step."""
    blocked_share_of_step: float
    worker_cpu_s_per_step: float
    """Of the blocked time, what the worker's own thread worked: what is left where every worker has its own core."""
    late_share_of_steps: float
    """Steps that began more than `LATE_SHARE_OF_STEP` of a step after their time: the machine was too slow for them."""
    shard_cpu_s_per_step: float
    """Of all shards, for one step of all workers."""


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
    """A whole run of `bench pool`."""

    settings: PoolSettings
    machine: Mapping[str, str | float]
    wall_s: float
    series: tuple[Series, ...]


class Tick(NamedTuple):
    """One step of one simulated worker."""

    blocked_s: float
    """In calls of the pool: by so much the step would be shorter without one."""
    cpu_s: float
    """Of these, at work in the worker's thread."""
    late_s: float
    """How long after its time the step began."""


def latency(seconds: Sequence[float]) -> Latency:
    """Raises ValueError where there is nothing to sum up."""
    if not seconds:
        raise ValueError("no samples")
    times_ms = np.array(seconds) * 1000
    median_ms, p99_ms = np.percentile(times_ms, [50, 99]).tolist()
    return Latency(len(seconds), median_ms, float(times_ms.mean()), p99_ms)


def levels_to(labels: int) -> list[int]:
    """Fill levels at which to measure: 1, 3, 10, 30 and so on over the last two decades, and `labels`."""
    known = (first * 10**decade for decade in range(1, 12) for first in (1, 3))
    return [*(level for level in known if max(MIN_LEVEL, labels / 100) <= level <= labels / 1.5), labels]


def job_of(ticks: Sequence[Tick], steps: int, shard_cpu_s: float) -> WorkerWaits:
    """Sums up the steps of all workers, `steps` of each; raises ValueError where there are none."""
    blocked = latency([tick.blocked_s for tick in ticks])
    late = sum(tick.late_s > LATE_SHARE_OF_STEP * STEP_S for tick in ticks) / len(ticks)
    return WorkerWaits(
        worker_steps=len(ticks),
        blocked=blocked,
        blocked_share_of_step=blocked.mean_ms / 1000 / STEP_S,
        worker_cpu_s_per_step=sum(tick.cpu_s for tick in ticks) / len(ticks),
        late_share_of_steps=late,
        shard_cpu_s_per_step=shard_cpu_s / steps,
    )
