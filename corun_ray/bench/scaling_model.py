"""Predict by formula how long a training step takes on many GPUs, from its time on one.

The parts: the all-reduce of gradients in rings and trees, DDP's buckets and their overlap with the backward pass, the
label pool's answers, and the wait for the slowest worker. Workers are alike and wait for each other once a step, when
they average their gradients. Not modelled: GPUs of unequal speed, links shared with others, storage, and the sample
stream, whose demand for cores `count_stream_cores` returns.

Times hold for the bandwidth that a link really carries. Take a measured one for a forecast (`bench scaling` for gloo,
nccl-tests' "bus bandwidth" for NCCL) and the nominal one for a bound.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from corun_ray.core.choices import Encoding

MIB = 2**20
BYTES_PER_GBIT = 1e9 / 8

FIRST_BUCKET_BYTES = MIB
BUCKET_BYTES = 25 * MIB
"""Sizes at which DDP closes its first bucket of gradients and the others: torch's defaults.

Source: Li et al., PyTorch Distributed, VLDB 2020, arXiv 2006.15704.
"""
TREE_BANDWIDTH_SHARE = 0.9
"""Share of the bandwidth that NCCL expects of trees. Source: NCCL's src/graph/tuning.cc."""
SHARD_S_PER_LABEL = 0.0019
"""Processor time of a shard for one read and a tenth of an offer: so many candidates win.

Measured: docs/reliability.md, Scale.
"""
BYTES_PER_VALUE = {"uint8": 1, "float16": 2, "float32": 4}
NEGLIGIBLE_SHARE_OF_STEP = 0.01
"""A loss up to this share of a step is not worth changing a key of the job."""


# --- Gradients ---


class Link(NamedTuple):
    """A connection between neighbours in a ring or tree."""

    latency_s: float
    """Time of one message, software included."""
    bytes_per_s: float
    """Bandwidth in each direction. On a node with several network cards, that of all cards together."""


@dataclass(frozen=True)
class Topology:
    """Equal workers on nodes of `per_node` workers; fewer workers share one node."""

    workers: int
    per_node: int
    inside: Link
    """Between the workers of a node."""
    between: Link
    """Between nodes."""

    @property
    def nodes(self) -> int:
        """Number of nodes; the last may have fewer workers."""
        return math.ceil(self.workers / self.per_node)

    @property
    def _bytes_per_s(self) -> float:
        """Bandwidth of the narrowest link, which all data passes through."""
        if self.nodes == 1:
            return self.inside.bytes_per_s
        return min(self.inside.bytes_per_s, self.between.bytes_per_s)

    def predict_ring_s(self, num_bytes: int) -> float:
        """Predict the seconds of an all-reduce in a ring.

        The ring enters and leaves each node once. Each of N workers sends 2 (N - 1) / N of the data in 2 (N - 1)
        messages. Sources: Patarasuk and Yuan, JPDC 2009; the share of messages between nodes as in NCCL's
        src/graph/tuning.cc.
        """
        # Count the messages of both kinds of links.
        messages = 2 * (self.workers - 1)
        messages_between = 2 * (self.nodes - 1)
        messages_inside = messages - messages_between

        # All messages carry 1 / N of the data and wait for the narrowest link.
        latency_s = messages_inside * self.inside.latency_s + messages_between * self.between.latency_s
        return latency_s + messages / self.workers * num_bytes / self._bytes_per_s

    def predict_tree_s(self, num_bytes: int) -> float:
        """Predict the seconds of an all-reduce in trees.

        Data goes up and down two trees of nodes, each with half of it; inside a node the workers form a chain. Sources:
        Sanders, Speck and Träff, Parallel Computing 2009; latencies as in NCCL's src/graph/tuning.cc.
        """
        chain = math.ceil(self.workers / self.nodes) - 1
        depth = math.log2(self.nodes)

        latency_s = 2 * (chain * self.inside.latency_s + depth * self.between.latency_s)
        return latency_s + 2 * num_bytes / (TREE_BANDWIDTH_SHARE * self._bytes_per_s)

    def predict_all_reduce_s(self, num_bytes: int) -> float:
        """Predict the seconds of the faster all-reduce.

        NCCL chooses the faster of ring and tree; gloo has rings only. One worker needs no all-reduce: 0.
        """
        if self.workers == 1:
            return 0.0
        return min(self.predict_ring_s(num_bytes), self.predict_tree_s(num_bytes))


def split_into_buckets(
    gradients: Iterable[int], first_bytes: int = FIRST_BUCKET_BYTES, cap_bytes: int = BUCKET_BYTES
) -> list[int]:
    """Return the bytes of DDP's buckets.

    `gradients` are the bytes of each gradient, in the order in which the gradients become ready. The gradient that
    fills a bucket closes it.
    """
    # The first bucket is small, so that communication begins early.
    buckets: list[int] = []
    filled = 0
    for num_bytes in gradients:
        filled += num_bytes
        limit = cap_bytes if buckets else first_bytes
        if filled >= limit:
            buckets.append(filled)
            filled = 0

    # The last bucket holds what remains.
    if filled > 0:
        buckets.append(filled)
    return buckets


def predict_ready_times_s(buckets: Sequence[int], backward_s: float) -> list[float]:
    """Predict when each bucket is full.

    Times are seconds after the backward pass begins. The pass is taken to produce gradients evenly, byte by byte. CORUN
    nearly does: its modules are alike, and a bucket spans more than two of them.
    """
    return [float(done) * backward_s / sum(buckets) for done in np.cumsum(buckets)]


def predict_exposed_s(
    buckets: Sequence[int], ready_s: Sequence[float], predict_all_reduce_s: Callable[[int], float]
) -> float:
    """Predict the seconds by which communication outlasts the backward pass.

    The pass ends when the last bucket is ready. Buckets are reduced one after the other, each as soon as it is ready,
    and never slow the pass down. The last bucket is never hidden. Source: Li et al., VLDB 2020, section 3.2.
    """
    # A bucket waits for its gradients and for the bucket before it.
    done_s = 0.0
    for num_bytes, at_s in zip(buckets, ready_s, strict=True):
        done_s = max(done_s, at_s) + predict_all_reduce_s(num_bytes)
    return done_s - ready_s[-1]


def fit_link(workers: int, times_s: dict[int, float]) -> Link:
    """Fit a link's latency and bandwidth to measured ring all-reduces.

    `times_s` are the seconds by number of bytes, of rings of `workers`. The fit has the least squares of the relative
    error.

    Raises `ValueError` for fewer than two sizes.
    """
    if len(times_s) < 2:
        raise ValueError("a link's latency and bandwidth need the times of two sizes")

    # Solve fixed_s + bytes * s_per_byte = measured_s, every row divided by its measured time.
    measured_s = np.array([*times_s.values()])
    columns = np.array([[1.0, float(num_bytes)] for num_bytes in times_s]) / measured_s[:, None]
    (fixed_s, s_per_byte), *_ = np.linalg.lstsq(columns, np.ones(len(measured_s)), rcond=None)

    # A ring sends 2 (N - 1) messages, each of 1 / N of the data; noise may make the latency negative.
    messages = 2 * (workers - 1)
    return Link(max(0.0, float(fixed_s)) / messages, messages / workers / float(s_per_byte))


# --- Label pool and ratings ---


def count_label_bytes(size_px: int, encoding: Encoding, block_px: int = 32) -> int:
    """Return the bytes of one label of CORUN.

    A label holds four encoded planes (scene and transmission) and two float32 scores for each block.
    """
    planes_bytes = 4 * size_px**2 * BYTES_PER_VALUE[encoding]
    scores_bytes = 2 * 4 * (size_px // block_px) ** 2
    return planes_bytes + scores_bytes


def estimate_most_wins(workers: int, images: int, win_rate: float) -> float:
    """Return the expected winners of the worker with most.

    Each of `workers` has `images` candidates, whose number of winners is binomial. The others wait for the worker that
    rates most blocks.
    """
    # The chance that one worker has exactly k winners.
    chances = []
    for k in range(images + 1):
        chances.append(math.comb(images, k) * win_rate**k * (1 - win_rate) ** (images - k))

    # The mean of a maximum is the sum over k of P(some worker has at least k winners).
    expected = 0.0
    for k in range(1, images + 1):
        chance_of_fewer = min(1.0, sum(chances[:k]))
        expected += 1 - chance_of_fewer**workers
    return expected


def estimate_fullest_bin(items: int, bins: int) -> float:
    """Return about how many of `items` the fullest of `bins` gets.

    Each item goes to any of the bins. The fullest gets all of them at most. Source: Raab and Steger, RANDOM 1998, for
    many items a bin.
    """
    mean = items / bins
    return min(items, mean + math.sqrt(2 * mean * math.log(bins)))


@dataclass(frozen=True)
class PoolModel:
    """The label pool as a job configures it."""

    label_bytes: int
    shards: int = 1
    win_rate: float = 0.1
    """Share of the candidates that win."""
    shares_blocks: bool = False
    """Whether all workers rate the winners' blocks together. The messages for this are not modelled."""

    def predict_answers_s(self, topology: Topology, images: int, shards: int | None = None) -> float:
        """Predict the seconds until the last label arrives.

        All workers ask at once. The busiest shard's work counts, or the sending of the node that sends most, whichever
        is longer. Each shard is on a node of its own while there are enough nodes. On a single node, labels are read in
        place. `shards` replaces the model's own number.
        """
        # Work: each label costs the busiest shard its time.
        shards = self.shards if shards is None else shards
        labels = topology.workers * images
        work_s = estimate_fullest_bin(labels, shards) * SHARD_S_PER_LABEL
        if topology.nodes == 1:
            return work_s

        # Sending: the busiest node's link.
        sent_bytes = estimate_fullest_bin(labels, min(shards, topology.nodes)) * self.label_bytes
        return max(work_s, sent_bytes / topology.between.bytes_per_s)

    def predict_bytes_per_s(self, topology: Topology, images: int, step_s: float) -> float:
        """Predict all workers' label traffic, reads and writes."""
        labels_per_step = topology.workers * images * (1 + self.win_rate)
        return labels_per_step * self.label_bytes / step_s

    def find_shards_needed(self, topology: Topology, images: int, within_s: float) -> int | None:
        """Return the fewest shards that answer in time.

        None if no number does.
        """
        for shards in range(1, topology.workers * images + 1):
            if self.predict_answers_s(topology, images, shards) <= within_s:
                return shards
        return None


# --- The whole step ---


@dataclass(frozen=True)
class WorkerStep:
    """A step of one worker alone whose candidates lose, as `bench step` measures it."""

    step_s: float
    backward_s: float
    before_labels_s: float
    """From the request for labels until they are needed: the time of the teacher and its global scores."""
    rating_s: float
    """Additional time of a winner: the rating of one image's blocks."""
    images: int = 1
    """Real images in the step, each with a label; micro-batches included."""


@dataclass(frozen=True)
class ManyWorkersStep:
    """A step of many workers, and the losses that a worker alone would not have."""

    workers: int
    all_reduce_s: float
    """Time of all buckets, hidden or not."""
    exposed_s: float
    """The part of it that the backward pass does not hide."""
    pool_answers_s: float
    """Until the pool's last answer."""
    pool_wait_s: float
    """The part of it that the teacher does not hide."""
    shards_needed: int | None
    """The fewest shards that answer while the teacher works; None where no number does."""
    label_bytes_per_s: float
    """Labels read and written by all workers."""
    rating_wait_s: float
    """Rating of the worker with the most winners, beyond a worker's mean."""
    step_s: float
    efficiency: float
    """Images per second and worker, relative to one worker alone."""

    @property
    def costs(self) -> list[str]:
        """Losses worth acting on, the worst first.

        Each is "gradients", "pool" or "rating" and costs more than a negligible share of the step.
        """
        losses_s = {"gradients": self.exposed_s, "pool": self.pool_wait_s, "rating": self.rating_wait_s}

        # Sort the losses, then drop the negligible ones.
        worst_first = sorted(losses_s, key=lambda name: -losses_s[name])
        return [name for name in worst_first if losses_s[name] > NEGLIGIBLE_SHARE_OF_STEP * self.step_s]


def predict_step(
    alone: WorkerStep, pool: PoolModel | None, topology: Topology, buckets: Sequence[int]
) -> ManyWorkersStep:
    """Predict the step of all workers of a topology.

    `buckets` are the bytes of DDP's buckets. `pool` is None in pre-training.
    """
    # Gradients: the part of the all-reduce that outlasts the backward pass.
    ready_s = predict_ready_times_s(buckets, alone.backward_s)
    exposed_s = predict_exposed_s(buckets, ready_s, topology.predict_all_reduce_s)

    # Labels: the pool's answers behind the teacher's time. Ratings: all wait for the worker with the most winners,
    # unless the workers share the blocks.
    answers_s = rating_s = mean_rating_s = 0.0
    shards_needed: int | None = 0
    if pool is not None:
        answers_s = pool.predict_answers_s(topology, alone.images)
        shards_needed = pool.find_shards_needed(topology, alone.images, alone.before_labels_s)
        mean_rating_s = alone.rating_s * alone.images * pool.win_rate
        rating_s = mean_rating_s
        if not pool.shares_blocks:
            rating_s = alone.rating_s * estimate_most_wins(topology.workers, alone.images, pool.win_rate)
    pool_wait_s = max(0.0, answers_s - alone.before_labels_s)

    # The step is that of one worker and every loss.
    step_s = alone.step_s + rating_s + pool_wait_s + exposed_s
    return ManyWorkersStep(
        workers=topology.workers,
        all_reduce_s=sum(map(topology.predict_all_reduce_s, buckets)),
        exposed_s=exposed_s,
        pool_answers_s=answers_s,
        pool_wait_s=pool_wait_s,
        shards_needed=shards_needed,
        label_bytes_per_s=0.0 if pool is None else pool.predict_bytes_per_s(topology, alone.images, step_s),
        rating_wait_s=rating_s - mean_rating_s,
        step_s=step_s,
        efficiency=(alone.step_s + mean_rating_s) / step_s,
    )


def count_stream_cores(workers: int, images: int, step_s: float, samples_per_s: float) -> int:
    """Return the cores that the whole sample stream takes.

    `samples_per_s` is the rate of one core, which `bench stream` measures.
    """
    return math.ceil(workers * images / step_s / samples_per_s)
