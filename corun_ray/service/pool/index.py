"""The index of one shard of the label pool: its rule, and which label storage holds where.

The index is pure: it starts no process and touches no storage. A label's images are a `payload` that the index only
passes on; in the service, the payload is a reference to Ray's object store.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from corun_ray.core.training.labels import Scores, supersedes, surpasses

ROWS_PER_SEGMENT = 512
"""The most labels of a segment: 170 MB at 288 px in uint8."""
SMALL_SEGMENT_ROWS = 128
"""A segment with fewer labels is small."""
MAX_SMALL_SEGMENTS = 16
"""The most small segments that may stand before they are merged."""
MIN_LIVE_FRACTION = 0.5
"""A segment with a smaller fraction of labels in use is rewritten without the others."""
MAX_MOVED_ROWS = 4 * ROWS_PER_SEGMENT
"""The most labels that one save moves out of old segments, so that the cost of a save stays bounded."""


Rejections = dict[str, Scores]
"""Rejected labels: for the key of an image, the scores that a label must surpass to be in the pool."""


class Head(NamedTuple):
    """A label without its images, as the index knows it."""

    key: str
    scores: Scores
    step: int
    size_bytes: int


class SegmentRow(NamedTuple):
    """The row of a segment in which storage holds a label."""

    segment: str
    row: int


class Segment(NamedTuple):
    """A segment of the saved pool. If two segments hold the same key, the segment of higher `order` is right."""

    name: str
    order: int
    rows: int


def is_rejected(head: Head, rejections: Mapping[str, Scores]) -> bool:
    """Tell whether a label is the rejected label of its image, or no better."""
    rejected = rejections.get(head.key)
    return rejected is not None and not surpasses(head.scores, rejected)


def merge_rejections(*several: Mapping[str, Scores]) -> Rejections:
    """Merge rejections.

    Where two labels of an image were rejected, a label must surpass both.
    """
    merged: Rejections = {}
    for rejections in several:
        for key, scores in rejections.items():
            clarity, quality = merged.get(key, scores)
            merged[key] = Scores(max(clarity, scores.clarity), max(quality, scores.quality))
    return merged


@dataclass(slots=True)
class Entry:
    """A label of the pool, in memory (`payload`), in storage (`segment_row`), or in both."""

    head: Head
    version: int
    """Differs for every label that the shard has taken, so that a replaced label is recognised."""
    payload: Any = None
    segment_row: SegmentRow | None = None


@dataclass
class PoolCounters:
    """Totals since the run began, of one shard or, added up, of the pool."""

    labels: int = 0
    resident_bytes: int = 0
    """Size of the labels in the object store. The others are read back from storage on demand."""
    offers: int = 0
    wins: int = 0
    """Offers that the pool accepted."""
    reads: int = 0
    hits: int = 0
    """Reads that found a label."""
    loads: int = 0
    """Labels read back from storage."""
    evictions: int = 0
    """Labels dropped from memory because storage has them."""
    wins_by_step: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "PoolCounters") -> "PoolCounters":
        totals = {}
        for counter in fields(self):
            totals[counter.name] = getattr(self, counter.name) + getattr(other, counter.name)
        return PoolCounters(**totals)


class NewSegment(NamedTuple):
    """A segment to be written: for each row a payload, or the old row of a label that only storage has."""

    segment: Segment
    rows: list[Any]


@dataclass(frozen=True)
class FrozenIndex:
    """A shard's content at one moment: segments that exist already, and those to be written to complete it."""

    save_id: int
    kept: list[Segment]
    new: list[NewSegment]


class PoolIndex:
    """The content of one shard, and its rule.

    `writer` goes into the names of the segments: no two processes that write may have the same. `budget_bytes` bounds
    the labels in memory: beyond it, the least recently used are dropped as soon as storage has them.
    """

    def __init__(self, writer: str = "0", budget_bytes: float = math.inf) -> None:
        self.writer = writer
        self.budget_bytes = budget_bytes
        self.counters = PoolCounters()
        self.rejections: Rejections = {}
        """Rejected labels of this shard's keys. They last as long as the run."""
        self._entries: dict[str, Entry] = {}
        self._resident: dict[str, None] = {}
        """Keys of the labels in memory, the least recently used first."""
        self._segments: dict[str, Segment] = {}
        self._live: Counter[str] = Counter()
        """Labels in use, by segment."""
        self._pending: dict[int, dict[str, tuple[int, SegmentRow]]] = {}
        """Saves under way: save id → key → version of the saved label, and its row."""
        self._last_version = 0
        self._last_save_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    # --- The rule ---

    def read(self, keys: Sequence[str]) -> list[Entry | None]:
        """Return the stored labels of `keys`.

        None where there is no label.
        """
        found = [self._entries.get(key) for key in keys]

        # Labels that are read stay in memory longest.
        for entry in found:
            if entry is not None and entry.payload is not None:
                self._mark_used(entry.head.key)

        self.counters.reads += len(keys)
        self.counters.hits += sum(entry is not None for entry in found)
        return found

    def offer(self, head: Head, store: Callable[[], Any]) -> bool:
        """Take a label if it is better than the stored one.

        Returns whether the pool holds the label. `store` is called for a winner alone and returns its payload. The
        comparison here is the one that decides: the worker's own was made against a label that may have been replaced
        since.
        """
        # The same label may arrive twice, from a worker that could not know of its arrival: it is neither a new offer
        # nor a second win.
        stored = self._entries.get(head.key)
        if stored is not None and stored.head == head:
            return True

        # Compare: both scores must be at least as good as the stored label's.
        self.counters.offers += 1
        if not supersedes(head.scores, stored.head.scores if stored else None):
            return False

        # A rejected label has left the pool, but its place is only for a better one.
        if is_rejected(head, self.rejections):
            return False

        # Set: the new version tells a save under way that its label has been replaced.
        self.counters.wins += 1
        self.counters.wins_by_step[head.step] += 1
        self._remove(head.key)
        self._add(head)
        self.attach(head.key, store())
        return True

    # --- Memory ---

    def attach(self, key: str, payload: Any) -> None:
        """Note that the label of `key` is in memory."""
        entry = self._entries[key]
        if entry.payload is None:
            self.counters.resident_bytes += entry.head.size_bytes
        entry.payload = payload
        self._mark_used(key)

    def forget(self, key: str, payload: Any) -> None:
        """Drop a payload that turned out to be lost.

        The label itself is dropped if storage lacks it.
        """
        # Another payload means that the label has been replaced or read back since: nothing to do.
        entry = self._entries.get(key)
        if entry is None or entry.payload != payload:
            return

        self._drop_payload(entry)
        if entry.segment_row is None:
            self._remove(key)

    def evict(self) -> bool:
        """Drop saved labels from memory until the budget holds.

        Returns whether memory is still over budget, because the other labels are not saved.
        """
        # Choose victims, the least recently used first. A label that only memory has must stay.
        excess_bytes = self.counters.resident_bytes - self.budget_bytes
        victims = []
        for key in self._resident:
            if excess_bytes <= 0:
                break
            entry = self._entries[key]
            if entry.segment_row is not None:
                victims.append(entry)
                excess_bytes -= entry.head.size_bytes

        for entry in victims:
            self._drop_payload(entry)
        self.counters.evictions += len(victims)
        return excess_bytes > 0

    # --- Saving and restoring ---

    def freeze(self) -> FrozenIndex:
        """Fix the shard's content as of now.

        Returns the segments that stay, and those to be written. New segments take the labels that storage lacks, and
        those worth moving out of old segments. The shard may change while they are written; `mark_saved` then finds out
        which of its labels storage has.
        """
        # Choose old segments to rewrite: those mostly superseded, and small ones once there are many.
        rewritten = self._choose_segments_to_rewrite()

        # Collect the labels of the new segments: the unsaved ones, and those still in use of the segments to rewrite.
        moved = []
        for entry in self._entries.values():
            if entry.segment_row is None or entry.segment_row.segment in rewritten:
                moved.append(entry)

        # Keep the other segments that hold at least one label in use. The rest drops out of the snapshot.
        kept = []
        for segment in self._segments.values():
            if segment.name not in rewritten and self._live[segment.name] > 0:
                kept.append(segment)

        # Place the new segments after all others: if two segments hold the same key, the later one is right.
        order = 1 + max((segment.order for segment in self._segments.values()), default=0)

        # Cut the labels into segments of bounded size.
        self._last_save_id += 1
        save_id = self._last_save_id
        new: list[NewSegment] = []
        pending: dict[str, tuple[int, SegmentRow]] = {}
        for number, first in enumerate(range(0, len(moved), ROWS_PER_SEGMENT)):
            entries = moved[first : first + ROWS_PER_SEGMENT]
            name = f"{order:08d}-{self.writer}-{save_id:04d}-{number:04d}"
            segment = Segment(name, order, len(entries))

            # List the segment from now on, though no label is in it yet: a sweep must not delete its files.
            self._segments[name] = segment

            # A label in memory is written from there. Any other is copied from its old row.
            rows = [entry.segment_row if entry.payload is None else entry.payload for entry in entries]
            new.append(NewSegment(segment, rows))

            # Remember versions: a label that is replaced during the save must not count as saved.
            for row, entry in enumerate(entries):
                pending[entry.head.key] = (entry.version, SegmentRow(name, row))

        self._pending[save_id] = pending
        return FrozenIndex(save_id, kept, new)

    def mark_saved(self, save_id: int) -> None:
        """Note that the segments of a save are written.

        Its labels, unless replaced meanwhile, are in storage from now on.
        """
        # Point each label to its new row. Labels replaced since the freeze have another version, and are still unsaved.
        for key, (version, segment_row) in self._pending.pop(save_id, {}).items():
            entry = self._entries.get(key)
            if entry is not None and entry.version == version:
                self._move(entry, segment_row)

        # A segment of a save that is still under way stays, though no label is in it yet.
        unfinished = set()
        for pending in self._pending.values():
            for _, segment_row in pending.values():
                unfinished.add(segment_row.segment)

        # Forget the segments without a label in use. The next sweep deletes their files.
        for name in list(self._segments):
            if not self._live[name] and name not in unfinished:
                del self._segments[name]

    def get_segment_names(self) -> set[str]:
        """Return the segments in use or being written."""
        return set(self._segments)

    def restore(
        self,
        segments: Iterable[Segment],
        rows: Iterable[tuple[Head, SegmentRow]],
        counters: PoolCounters | None = None,
        rejections: Mapping[str, Scores] | None = None,
    ) -> int:
        """Replace the shard's content by that of a snapshot, without rejected labels.

        Labels in memory that the snapshot holds stay in memory. Returns the number of rejected labels in `rows`.
        """
        # Forget everything, saves under way included: no label of theirs may count as saved.
        before = self._entries
        self.counters = counters or PoolCounters()
        self.counters.resident_bytes = 0
        self._entries, self._resident, self._pending = {}, {}, {}
        self._live = Counter()
        self.rejections = dict(rejections or {})

        # Take the snapshot's labels, all of them in storage alone. Of two with the same key, the later one is right.
        self._segments = {segment.name: segment for segment in segments}
        num_rejected = 0
        for head, segment_row in rows:
            self._remove(head.key)
            if is_rejected(head, self.rejections):
                num_rejected += 1
            else:
                self._move(self._add(head), segment_row)

        # Keep the payloads of labels that are the same as before: reading them back would cost a request each.
        for key, entry in self._entries.items():
            old = before.get(key)
            if old is not None and old.head == entry.head and old.payload is not None:
                self.attach(key, old.payload)
        return num_rejected

    def get_counters(self) -> PoolCounters:
        """Return the counters as of now."""
        self.counters.labels = len(self._entries)
        return self.counters

    def _add(self, head: Head) -> Entry:
        """Add a label under a version of its own.

        It has neither payload nor row yet.
        """
        self._last_version += 1
        entry = Entry(head, self._last_version)
        self._entries[head.key] = entry
        return entry

    def _mark_used(self, key: str) -> None:
        """Mark a label in memory as the last used.

        Its key moves to the end of `_resident`.
        """
        self._resident.pop(key, None)
        self._resident[key] = None

    def _drop_payload(self, entry: Entry) -> None:
        if entry.payload is not None:
            entry.payload = None
            del self._resident[entry.head.key]
            self.counters.resident_bytes -= entry.head.size_bytes

    def _remove(self, key: str) -> None:
        """Remove the label of a key, if there is one.

        Memory and its segment's count of labels in use follow.
        """
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._drop_payload(entry)
            if entry.segment_row is not None:
                self._live[entry.segment_row.segment] -= 1

    def _move(self, entry: Entry, segment_row: SegmentRow) -> None:
        """Point a label to its row of a segment.

        The segments' counts of labels in use follow.
        """
        if entry.segment_row is not None:
            self._live[entry.segment_row.segment] -= 1
        entry.segment_row = segment_row
        self._live[segment_row.segment] += 1

    def _choose_segments_to_rewrite(self) -> set[str]:
        """Choose the segments whose labels move to new ones.

        These are segments mostly superseded, and small ones once there are many.
        """
        # Superseded labels take room in storage, and time whenever an index is read. Small segments cost a request each
        # when a pool is restored.
        superseded, small = [], []
        for segment in self._segments.values():
            live = self._live[segment.name]
            if live == 0:
                continue  # Nothing is left to move.
            if live < MIN_LIVE_FRACTION * segment.rows:
                superseded.append(segment)
            if segment.rows < SMALL_SEGMENT_ROWS:
                small.append(segment)

        # Superseded segments come first; small ones follow, once there are many.
        candidates = superseded
        if len(small) > MAX_SMALL_SEGMENTS:
            candidates = superseded + [segment for segment in small if segment not in superseded]

        # Bound the labels that one save moves. The next save continues.
        chosen: set[str] = set()
        moved_rows = 0
        for segment in candidates:
            moved_rows += self._live[segment.name]
            if moved_rows > MAX_MOVED_ROWS:
                break
            chosen.add(segment.name)
        return chosen
