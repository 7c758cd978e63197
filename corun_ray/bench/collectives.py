"""How long gradients take from GPU to GPU, by formula: all-reduce in rings and trees, DDP's buckets, the overlap.

Times are for what a link really carries: take its bandwidth from a measurement (`bench scaling` for gloo, nccl-tests'
"bus bandwidth" for NCCL), or the nominal one for a bound.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
class Layout:
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
