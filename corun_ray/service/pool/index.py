"""One shard of the label pool, pure: its index, its rule, what is saved where. No process, no storage.

Labels themselves are `payload`s that the index only passes on: references to Ray's object store in the service.


What the label pool's parts tell each other: labels without images, places, segments, saves, counters."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from corun_ray.core.training.labels import Scores, supersedes


class Head(NamedTuple):
    """What the index knows of a label without its images."""

    key: str
    scores: Scores
    step: int
    size_bytes: int


class SegmentRow(NamedTuple):
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
    place: SegmentRow | None = None


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


ROWS_PER_SEGMENT = 512
"""Labels in a segment at most: 170 MB at 288 px in uint8."""
SMALL_ROWS = 128
MAX_SMALL_SEGMENTS = 16
"""As many segments of fewer than `SMALL_ROWS` labels may stand before they are merged."""
MIN_LIVE_FRACTION = 0.5
"""A segment with a smaller share of labels still in use is rewritten without the others."""
COMPACTED_ROWS = 4 * ROWS_PER_SEGMENT
"""Labels that one save moves out of old segments at most, so that its cost stays bounded."""


class PoolIndex:
    """The content of one shard and its rule.

    `budget_bytes` bounds what stays in memory: beyond it, the labels that were not asked for longest are dropped as
    soon as storage has them.
    """

    def __init__(self, writer: str = "0", budget_bytes: float = math.inf) -> None:
        """`writer` goes into the names of the segments: no two processes that write may have the same."""
        self.writer = writer
        self.budget_bytes = budget_bytes
        self.counters = PoolCounters()
        self._entries: dict[str, Entry] = {}
        self._resident: dict[str, None] = {}
        """Keys of the labels in memory, the longest unused first."""
        self._segments: dict[str, Segment] = {}
        self._live: Counter[str] = Counter()
        """Labels in use by segment."""
        self._pending: dict[int, dict[str, tuple[int, SegmentRow]]] = {}
        """Saves under way: key → version and place."""
        self._version = 0
        self._save = 0

    def __len__(self) -> int:
        return len(self._entries)

    def heads(self) -> Iterator[Head]:
        """Every label of the shard, without its images."""
        return (entry.head for entry in self._entries.values())

    def read(self, keys: Sequence[str]) -> list[Entry | None]:
        """The stored labels of `keys`, None where there is none."""
        found = [self._entries.get(key) for key in keys]
        for entry in found:
            if entry is not None and entry.payload is not None:
                self._touch(entry.head.key)
        self.counters.reads += len(keys)
        self.counters.hits += sum(entry is not None for entry in found)
        return found

    def offer(self, head: Head, store: Callable[[], Any]) -> bool:
        """Keeps a label if it supersedes the stored one, its payload being what `store` returns."""
        stored = self._entries.get(head.key)
        if stored is not None and stored.head == head:
            return True  # the same label again, from a worker that could not know that it had arrived
        self.counters.offers += 1
        if not supersedes(head.scores, stored.head.scores if stored else None):
            return False
        self.counters.wins += 1
        self.counters.wins_by_step[head.step] += 1
        self._remove(head.key)
        self._version += 1
        self._entries[head.key] = Entry(head, self._version)
        self.attach(head.key, store())
        return True

    def attach(self, key: str, payload: Any) -> None:
        """The label of `key` is in memory (again)."""
        entry = self._entries[key]
        if entry.payload is None:
            self.counters.resident_bytes += entry.head.size_bytes
        entry.payload = payload
        self._touch(key)

    def forget(self, key: str, payload: Any) -> None:
        """This payload of `key` turned out to be lost: from now on storage has the label, or nobody."""
        entry = self._entries.get(key)
        if entry is not None and entry.payload == payload:
            self._drop(entry)
            if entry.place is None:
                self._remove(key)

    def evict(self) -> bool:
        """Drops labels from memory until the budget holds; says whether it still does not, for want of saved ones."""
        excess = self.counters.resident_bytes - self.budget_bytes
        dropped = []
        for key in self._resident:
            if excess <= 0:
                break
            entry = self._entries[key]
            if entry.place is not None:
                dropped.append(entry)
                excess -= entry.head.size_bytes
        for entry in dropped:
            self._drop(entry)
        self.counters.evictions += len(dropped)
        return excess > 0

    def freeze(self) -> Frozen:
        """What storage must hold for the pool to be saved as it is now: old segments, and new ones to be written.

        New ones take the labels that are not saved yet, and those that are worth moving out of old segments.
        """
        victims = self._worth_rewriting()
        moved = [e for e in self._entries.values() if e.place is None or e.place.segment in victims]
        kept = [s for s in self._segments.values() if s.name not in victims and self._live[s.name] > 0]
        order = 1 + max((segment.order for segment in self._segments.values()), default=0)
        self._save += 1
        parts: list[Part] = []
        places: dict[str, tuple[int, SegmentRow]] = {}
        for count, first in enumerate(range(0, len(moved), ROWS_PER_SEGMENT)):
            entries = moved[first : first + ROWS_PER_SEGMENT]
            name = f"{order:08d}-{self.writer}-{self._save:04d}-{count:04d}"
            segment = Segment(name, order, len(entries))
            self._segments[name] = segment
            parts.append(Part(segment, [e.place if e.payload is None else e.payload for e in entries]))
            places |= {e.head.key: (e.version, SegmentRow(name, row)) for row, e in enumerate(entries)}
        self._pending[self._save] = places
        return Frozen(self._save, kept, parts)

    def saved(self, save: int) -> None:
        """The segments of a save are written: its labels, unless replaced meanwhile, are on storage."""
        for key, (version, place) in self._pending.pop(save, {}).items():
            entry = self._entries.get(key)
            if entry is not None and entry.version == version:
                self._move(entry, place)
        unfinished = {place.segment for places in self._pending.values() for _, place in places.values()}
        dead = [name for name in self._segments if not self._live[name] and name not in unfinished]
        for name in dead:
            del self._segments[name]

    def segment_names(self) -> set[str]:
        """Segments that hold labels of this shard or are being written."""
        return set(self._segments)

    def restore(
        self, segments: Iterable[Segment], rows: Iterable[tuple[Head, SegmentRow]], counters: PoolCounters | None = None
    ) -> None:
        """Makes the shard what a snapshot holds; labels that are in memory already stay there."""
        before = self._entries
        self.counters = counters or PoolCounters()
        self.counters.resident_bytes = 0
        self._entries, self._resident, self._pending = {}, {}, {}
        self._live = Counter()
        self._segments = {segment.name: segment for segment in segments}
        for head, place in rows:
            self._version += 1
            self._remove(head.key)
            self._entries[head.key] = Entry(head, self._version)
            self._move(self._entries[head.key], place)
        for key, entry in self._entries.items():
            old = before.get(key)
            if old is not None and old.head == entry.head and old.payload is not None:
                self.attach(key, old.payload)

    def totals(self) -> PoolCounters:
        """The counters as of now."""
        self.counters.labels = len(self._entries)
        return self.counters

    def _touch(self, key: str) -> None:
        self._resident.pop(key, None)
        self._resident[key] = None

    def _drop(self, entry: Entry) -> None:
        if entry.payload is not None:
            entry.payload = None
            del self._resident[entry.head.key]
            self.counters.resident_bytes -= entry.head.size_bytes

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._drop(entry)
            if entry.place is not None:
                self._live[entry.place.segment] -= 1

    def _move(self, entry: Entry, place: SegmentRow) -> None:
        if entry.place is not None:
            self._live[entry.place.segment] -= 1
        entry.place = place
        self._live[place.segment] += 1

    def _worth_rewriting(self) -> set[str]:
        """Segments that are mostly superseded, and small ones once there are many; `COMPACTED_ROWS` labels at most."""
        standing = [s for s in self._segments.values() if self._live[s.name] > 0]
        small = [s for s in standing if s.rows < SMALL_ROWS]
        found = [s for s in standing if self._live[s.name] < MIN_LIVE_FRACTION * s.rows]
        if len(small) > MAX_SMALL_SEGMENTS:
            found += [s for s in small if s not in found]
        victims: set[str] = set()
        rows = 0
        for segment in found:
            rows += self._live[segment.name]
            if rows > COMPACTED_ROWS:
                break
            victims.add(segment.name)
        return victims
