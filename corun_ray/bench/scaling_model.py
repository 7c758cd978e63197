"""What a step takes on many GPUs, by formula, from what it takes on one: gradients, the pool, the slowest worker.

Workers are alike and wait for each other once in a step, when they average their gradients. Left out: GPUs of unequal
speed, links shared with others, storage, and the stream, of which `stream_cores` says what it asks for.


How long gradients take from GPU to GPU, by formula: all-reduce in rings and trees, DDP's buckets, the overlap.

Times are for what a link really carries: take its bandwidth from a measurement (`bench scaling` for gloo, nccl-tests'
"bus bandwidth" for NCCL), or the nominal one for a bound."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from corun_ray.core.choices import Encoding

MIB = 2**20
FIRST_BUCKET_BYTES, BUCKET_BYTES = MIB, 25 * MIB
"""DDP's defaults. Source: Li et al., PyTorch Distributed, VLDB 2020, arXiv 2006.15704, and torch's own."""
TREE_SHARE = 0.9
"""Of the bandwidth that NCCL counts on in trees (src/graph/tuning.cc)."""


class Link(NamedTuple):
    """Between neighbours in a ring or tree."""

    latency_s: float
    """Of one message, software included."""
    bytes_per_s: float
    """In each direction; of a node with several network cards, of all of them together."""


@dataclass(frozen=True)
class Topology:
    """Equal workers on nodes of `per_node` each; fewer share one node."""

    workers: int
    per_node: int
    inside: Link
    """Between the workers of a node."""
    between: Link
    """Between nodes."""

    @property
    def nodes(self) -> int:
        """How many there are; the last may have fewer workers."""
        return math.ceil(self.workers / self.per_node)

    @property
    def _bytes_per_s(self) -> float:
        """Of the narrowest link, which all data passes through."""
        return self.inside.bytes_per_s if self.nodes == 1 else min(self.inside.bytes_per_s, self.between.bytes_per_s)

    def ring_s(self, num_bytes: int) -> float:
        """An all-reduce around a ring that enters and leaves each node once.

        Each worker sends 2 (N - 1) / N of the data in 2 (N - 1) messages. Source: Patarasuk and Yuan, JPDC 2009; which
        of the messages go between nodes, as in NCCL's src/graph/tuning.cc.
        """
        messages, between = 2 * (self.workers - 1), 2 * (self.nodes - 1)
        latency_s = (messages - between) * self.inside.latency_s + between * self.between.latency_s
        return latency_s + messages / self.workers * num_bytes / self._bytes_per_s

    def tree_s(self, num_bytes: int) -> float:
        """An all-reduce up and down two trees of nodes that share the data, in chains inside the nodes.

        Source: Sanders, Speck and Träff, Parallel Computing 2009; latencies as in NCCL's src/graph/tuning.cc.
        """
        chain, depth = math.ceil(self.workers / self.nodes) - 1, math.log2(self.nodes)
        latency_s = 2 * (chain * self.inside.latency_s + depth * self.between.latency_s)
        return latency_s + 2 * num_bytes / (TREE_SHARE * self._bytes_per_s)

    def all_reduce_s(self, num_bytes: int) -> float:
        """The faster of the two, as NCCL chooses; 0 for one worker. (gloo has rings only.)"""
        return 0.0 if self.workers == 1 else min(self.ring_s(num_bytes), self.tree_s(num_bytes))


def bucket_sizes(
    gradients: Iterable[int], first_bytes: int = FIRST_BUCKET_BYTES, cap_bytes: int = BUCKET_BYTES
) -> list[int]:
    """Bytes of DDP's buckets for gradients of so many bytes in the order in which they become ready.

    A bucket is closed by the gradient that fills it.
    """
    buckets: list[int] = []
    filled = 0
    for num_bytes in gradients:
        filled += num_bytes
        if filled >= (cap_bytes if buckets else first_bytes):
            buckets.append(filled)
            filled = 0
    return buckets + [filled] * (filled > 0)


def ready_times_s(buckets: Sequence[int], backward_s: float) -> list[float]:
    """When each bucket is full after a backward pass began that makes gradients evenly, byte by byte.

    CORUN's does, nearly: its modules are alike, and a bucket spans more than two of them.
    """
    return [float(done) * backward_s / sum(buckets) for done in np.cumsum(buckets)]


def exposed_s(buckets: Sequence[int], ready_s: Sequence[float], all_reduce_s: Callable[[int], float]) -> float:
    """How long the communication outlasts the backward pass, which ends when the last bucket is ready.

    Buckets go one after the other, each as soon as it is ready; they never slow the backward pass down. The last one
    is never hidden. Source: Li et al., VLDB 2020, section 3.2.
    """
    done_s = 0.0
    for num_bytes, at_s in zip(buckets, ready_s, strict=True):
        done_s = max(done_s, at_s) + all_reduce_s(num_bytes)
    return done_s - ready_s[-1]


def fitted_link(workers: int, times_s: dict[int, float]) -> Link:
    """The link on which rings of `workers` take these times, by bytes: least squares of the relative error.

    Raises `ValueError` for fewer than two sizes.
    """
    if len(times_s) < 2:
        raise ValueError("a link's latency and bandwidth need the times of two sizes")
    measured_s = np.array([*times_s.values()])
    columns = np.array([[1.0, float(num_bytes)] for num_bytes in times_s]) / measured_s[:, None]
    (fixed_s, s_per_byte), *_ = np.linalg.lstsq(columns, np.ones(len(measured_s)), rcond=None)
    messages = 2 * (workers - 1)
    return Link(max(0.0, float(fixed_s)) / messages, messages / workers / float(s_per_byte))


SHARD_S_PER_LABEL = 0.0019
"""Processor time of a shard for reading a label and for a tenth of an offer. Measured: docs/reliability.md, Scale."""
BYTES_OF = {"uint8": 1, "float16": 2, "float32": 4}
NEGLIGIBLE = 0.01
"""Share of a step that is not worth a key."""


def label_bytes(size_px: int, encoding: Encoding, block_px: int = 32) -> int:
    """What a label of CORUN takes: scene and transmission as encoded, two float32 scores a block."""
    return 4 * size_px**2 * BYTES_OF[encoding] + 2 * 4 * (size_px // block_px) ** 2


def most_wins(workers: int, images: int, win_rate: float) -> float:
    """Mean of the most winners that any of `workers` has among its `images` (its own being binomial).

    The others wait for the one that rates most blocks.
    """
    chances = [math.comb(images, k) * win_rate**k * (1 - win_rate) ** (images - k) for k in range(images + 1)]
    return sum(1 - min(1.0, sum(chances[:k])) ** workers for k in range(1, images + 1))


def fullest(items: int, bins: int) -> float:
    """About how many of `items` the fullest of `bins` gets when each goes to any of them, at most all.

    Source: Raab and Steger, RANDOM 1998, for many items a bin.
    """
    mean = items / bins
    return min(items, mean + math.sqrt(2 * mean * math.log(bins)))


@dataclass(frozen=True)
class WorkerStep:
    """A step of one worker alone, as `bench step` measures it; its candidates lose."""

    step_s: float
    backward_s: float
    before_labels_s: float
    """From asking for labels until they are needed: the teacher and its global scores."""
    rating_s: float
    """What a winner adds: the rating of one image's blocks."""
    images: int = 1
    """Real images, each with a label; of all parts of the step."""


@dataclass(frozen=True)
class PoolModel:
    """The label pool as a job sets it up."""

    label_bytes: int
    shards: int = 1
    win_rate: float = 0.1
    """Share of the candidates that win."""
    shares_blocks: bool = False
    """All workers rate the winners' blocks together; what that sends is left out."""

    def answers_s(self, layout: Topology, images: int, shards: int | None = None) -> float:
        """Until the last label is there, when all workers ask at once: the busiest shard's work, or node's sending.

        Shards are on nodes of their own while there are enough. On one node labels are read in place.
        """
        shards, labels = shards or self.shards, layout.workers * images
        work_s = fullest(labels, shards) * SHARD_S_PER_LABEL
        if layout.nodes == 1:
            return work_s
        sent = fullest(labels, min(shards, layout.nodes)) * self.label_bytes
        return max(work_s, sent / layout.between.bytes_per_s)

    def bytes_per_s(self, layout: Topology, images: int, step_s: float) -> float:
        """Labels read and written by all workers."""
        return layout.workers * images * (1 + self.win_rate) * self.label_bytes / step_s

    def shards_needed(self, layout: Topology, images: int, within_s: float) -> int | None:
        """The fewest that answer in time; None if none do."""
        most = layout.workers * images
        return next((n for n in range(1, most + 1) if self.answers_s(layout, images, n) <= within_s), None)


@dataclass(frozen=True)
class ManyWorkersStep:
    """A step of many workers, and what in it a worker alone would not have had."""

    workers: int
    all_reduce_s: float
    """Of all buckets, hidden or not."""
    exposed_s: float
    """What the backward pass does not hide of it."""
    pool_answers_s: float
    pool_wait_s: float
    """What the teacher does not hide of it."""
    shards_needed: int | None
    """That answer while the teacher works; None where no number does."""
    label_bytes_per_s: float
    """Read and written by all workers."""
    rating_wait_s: float
    """For the worker with the most winners, beyond a worker's mean."""
    step_s: float
    efficiency: float
    """Images a second and worker, of those of one worker alone."""

    @property
    def costs(self) -> list[str]:
        """What of "gradients", "pool" and "rating" costs more than `NEGLIGIBLE`, the worst first."""
        losses = {"gradients": self.exposed_s, "pool": self.pool_wait_s, "rating": self.rating_wait_s}
        grave = [name for name in losses if losses[name] > NEGLIGIBLE * self.step_s]
        return sorted(grave, key=lambda name: -losses[name])


def scaled(alone: WorkerStep, pool: PoolModel | None, layout: Topology, buckets: Sequence[int]) -> ManyWorkersStep:
    """The step of the layout's workers, DDP's buckets being of so many bytes; `pool` is None in pre-training."""
    outlasts_s = exposed_s(buckets, ready_times_s(buckets, alone.backward_s), layout.all_reduce_s)
    answers_s = rating_s = mean_rating_s = 0.0
    needed: int | None = 0
    if pool is not None:
        answers_s = pool.answers_s(layout, alone.images)
        needed = pool.shards_needed(layout, alone.images, alone.before_labels_s)
        mean_rating_s = alone.rating_s * alone.images * pool.win_rate
        rating_s = alone.rating_s * most_wins(layout.workers, alone.images, pool.win_rate)
        if pool.shares_blocks:
            rating_s = mean_rating_s
    pool_wait_s = max(0.0, answers_s - alone.before_labels_s)
    step_s = alone.step_s + rating_s + pool_wait_s + outlasts_s
    return ManyWorkersStep(
        workers=layout.workers,
        all_reduce_s=sum(map(layout.all_reduce_s, buckets)),
        exposed_s=outlasts_s,
        pool_answers_s=answers_s,
        pool_wait_s=pool_wait_s,
        shards_needed=needed,
        label_bytes_per_s=0.0 if pool is None else pool.bytes_per_s(layout, alone.images, step_s),
        rating_wait_s=rating_s - mean_rating_s,
        step_s=step_s,
        efficiency=(alone.step_s + mean_rating_s) / step_s,
    )


def stream_cores(workers: int, images: int, step_s: float, samples_per_s: float) -> int:
    """Cores that the whole stream takes at that step, each making `samples_per_s` (see `bench stream`)."""
    return math.ceil(workers * images / step_s / samples_per_s)
