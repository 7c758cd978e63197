"""What the label pool's parts tell each other: labels without images, places, segments, saves, counters."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from corun_ray.core.training.labels import Scores


class Head(NamedTuple):
    """What the index knows of a label without its images."""

    key: str
    scores: Scores
    step: int
    size_bytes: int


class Place(NamedTuple):
    """Where storage holds a label."""

    segment: str
    row: int


class Segment(NamedTuple):
    """A saved segment. Where two segments hold the same key, the one of higher `order` is right."""

    name: str
    order: int
    rows: int


@dataclass(slots=True)
class Entry:
    """A label of the pool; at least one of `payload` and `place` is there."""

    head: Head
    version: int
    payload: Any = None
    place: Place | None = None


@dataclass
class PoolCounters:
    """Totals since the run began, of one shard or, added up, of the pool."""

    labels: int = 0
    resident_bytes: int = 0
    """Size of the labels that are in the object store; the others are read back from storage when asked for."""
    offers: int = 0
    wins: int = 0
    """Offers that the pool took."""
    reads: int = 0
    hits: int = 0
    """Reads that found a label."""
    loads: int = 0
    """Labels read back from storage."""
    evictions: int = 0
    """Labels dropped from memory, since storage has them."""
    wins_by_step: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "PoolCounters") -> "PoolCounters":
        return PoolCounters(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Part(NamedTuple):
    """A segment to be written: its rows, each a payload or, for labels that only storage has, a place."""

    segment: Segment
    rows: list[Any]


@dataclass(frozen=True)
class Frozen:
    """The pool's content at one moment: segments that exist, and those that must be written to complete it."""

    save: int
    kept: list[Segment]
    parts: list[Part]
