"""One shard of the label pool as a Ray actor: `PoolIndex` with Ray's object store for its labels.

The actor puts each label into the object store itself and so owns it: labels outlive the worker that made them, are
read in place on a node, pulled between nodes, and spilled to disk by Ray where memory runs out. Segments are written by
tasks, labels read back from them by an actor of its own; the shard only answers.


The metrics of one shard of the label pool, from the counters that it keeps anyway."""

import functools
import hashlib
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ray

from corun_ray.core.training.labels import Label
from corun_ray.service.pool import segments, snapshots
from corun_ray.service.pool.index import Entry, Frozen, Head, Part, PoolCounters, PoolIndex, Segment, SegmentRow
from corun_ray.service.pool.segments import READS_AT_ONCE, SegmentReader
from corun_ray.service.storage import Location, StorageError, locate
from corun_ray.service.telemetry import prometheus as telemetry
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.telemetry.prometheus import NO_JOB, Metric, MetricRecorder


class PoolTelemetry:
    """Tells what a shard counts."""

    def __init__(self, labels: Mapping[str, str], number: int) -> None:
        self._recorder = MetricRecorder(labels, shard=str(number))

    def tell(self, counters: PoolCounters) -> None:
        """The shard as of now."""
        self._recorder.set(telemetry.POOL_LABELS, counters.labels)
        self._recorder.set(telemetry.POOL_BYTES, counters.resident_bytes)
        for metric, total in _totals(counters).items():
            self._recorder.advance(metric, total)

    def restored(self, counters: PoolCounters) -> None:
        """The shard goes on counting from here; what was counted before has been told by others."""
        for metric, total in _totals(counters).items():
            self._recorder.skip(metric, total)
        self._recorder.add(telemetry.POOL_RESTORES)
        self.tell(counters)


def _totals(counters: PoolCounters) -> dict[Metric, int]:
    return {
        telemetry.POOL_OFFERS: counters.offers,
        telemetry.POOL_WINS: counters.wins,
        telemetry.POOL_READS: counters.reads,
        telemetry.POOL_HITS: counters.hits,
    }


LABELS_AT_ONCE = 32
"""Labels that a writing task has in memory beside the segment that it makes."""


class Reply(NamedTuple):
    """What a shard answers to a read."""

    incarnation: int | None
    """Which start of the shard's process answers; None while it has yet to restore its labels."""
    saved_step: int
    """Labels made before this step are on storage."""
    labels: list[ray.ObjectRef | None]


class PartOfSave(NamedTuple):
    """A shard's part in a snapshot under way."""

    kept: list[Segment]
    new: list[Segment]
    written: ray.ObjectRef | None
    """Ready when the new segments are; None if there are none."""
    counters: PoolCounters


class PoolShard:
    """Shard `number` of `num_shards`, its segments below `pool_uri`. At most one call runs at a time.

    `generation` numbers the starts of the worker group. A restored pool stands where the checkpoint stood, and an
    offer that a dead worker left under way must not undo that.
    """

    def __init__(
        self,
        number: int,
        num_shards: int,
        pool_uri: str,
        budget_bytes: float = math.inf,
        labels: Mapping[str, str] = NO_JOB,
    ) -> None:
        self._number, self._num_shards, self._pool_uri = number, num_shards, pool_uri
        self._index = PoolIndex(f"{number:03d}-{uuid.uuid4().hex[:12]}", budget_bytes)
        self._telemetry, self._log = PoolTelemetry(labels, number), Log("shard", labels, shard=number)
        self._incarnation = time.time_ns()
        self._generation = 0
        self._saved_step = 0
        self._flush: ray.ObjectRef | None = None
        self._has_to_restore = ray.get_runtime_context().was_current_actor_reconstructed

    def read(self, keys: Sequence[str]) -> Reply:
        """References to the stored labels of `keys`, None where there is none."""
        if not self._is_whole():
            return Reply(None, 0, [None] * len(keys))
        entries = self._index.read(keys)
        self._load(entry for entry in entries if entry is not None and entry.payload is None)
        found = [None if entry is None else entry.payload for entry in entries]
        self._keep_to_budget()
        self._telemetry.tell(self._index.totals())
        return Reply(self._incarnation, self._saved_step, found)

    def offer(self, generation: int, labels: Sequence[Label]) -> list[bool]:
        """Keeps each label that supersedes the stored one; says which."""
        if not self._is_whole() or generation != self._generation:
            return [False] * len(labels)
        taken = [self._index.offer(head_of(label), functools.partial(ray.put, label)) for label in labels]
        self._keep_to_budget()
        self._telemetry.tell(self._index.totals())
        return taken

    def forget(self, generation: int, lost: Sequence[tuple[str, ray.ObjectRef]]) -> None:
        """A reader could not get these labels: from now on they are read back from storage, if it has them."""
        if generation == self._generation:
            for key, label in lost:
                self._index.forget(key, label)

    def freeze(self, generation: int) -> PartOfSave:
        """Fixes the pool's content as of now and starts writing what storage lacks of it.

        Raises RuntimeError for a worker of an earlier start and `StorageError` where the shard cannot restore.
        """
        self._restore_if_due()
        self._refuse_other(generation)
        frozen = self._index.freeze()
        written = self._write(frozen)
        return PartOfSave(frozen.kept, [part.segment for part in frozen.parts], written, self._index.totals())

    def saved(self, save: int) -> None:
        """The segments of a save are written."""
        self._index.saved(save)
        self._flush = None
        self._index.evict()

    def confirm(self, generation: int, step: int) -> None:
        """The snapshot of `step` is complete."""
        if generation == self._generation:
            self._saved_step = max(self._saved_step, step)

    def segment_names(self, generation: int) -> set[str]:
        """Segments that this shard uses or is writing; raises RuntimeError for a worker of an earlier start."""
        self._restore_if_due()
        self._refuse_other(generation)
        return self._index.segment_names()

    def restore(self, snapshot: str | None, generation: int) -> int:
        """Makes the shard its part of a snapshot (None: empty) for this start of the workers; returns its labels.

        Only the index is read; labels follow when they are asked for. Raises `StorageError`.
        """
        if snapshot is None:
            self._index.restore((), ())
            self._saved_step = 0
        else:
            content = snapshots.read(self._pool.child(snapshot))
            counters = snapshots.counters_of_shard(content, self._number, self._num_shards)
            records = snapshots.segments_of_shard(content, self._number, self._num_shards)
            rows = snapshots.index(self._pool, content, records)
            mine = (row for key, row in rows.items() if shard_of(key, self._num_shards) == self._number)
            kept = [Segment(record.name, record.order, record.rows) for record in records]
            self._index.restore(kept, mine, counters)
            self._saved_step = content.step
        self._generation, self._has_to_restore = generation, False
        self._telemetry.restored(self._index.totals())
        self._log.info("label pool restored", snapshot=snapshot or "none", labels=len(self._index))
        return len(self._index)

    def counters(self) -> PoolCounters:
        """See `PoolCounters`."""
        return self._index.totals()

    def ping(self) -> tuple[int | None, int]:
        """Incarnation and saved step, as of a `Reply`; everything that was sent before has been decided."""
        return (self._incarnation, self._saved_step) if self._is_whole() else (None, 0)

    @property
    def _pool(self) -> Location:
        return locate(self._pool_uri)

    def _restore_if_due(self) -> None:
        if self._has_to_restore:
            current = snapshots.read_current(self._pool)
            self.restore(current.snapshot, current.generation)

    def _is_whole(self) -> bool:
        """Whether the shard holds what it should; while storage is out of reach it does not, and workers go on."""
        try:
            self._restore_if_due()
        except StorageError:
            return False
        return True

    def _refuse_other(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError(f"label pool: generation {generation} of the workers is over, {self._generation} runs")

    def _load(self, entries: Iterable[Entry]) -> None:
        """Starts reading labels back."""
        for entry in entries:
            assert entry.place is not None
            self._index.attach(entry.head.key, self._reader.read.remote(*entry.place))
            self._index.counters.loads += 1

    @functools.cached_property
    def _reader(self) -> Any:
        """Beside the shard, which owns what it reads; it goes when the shard goes."""
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        reader: Any = ray.remote(SegmentReader)
        options = reader.options(num_cpus=0, max_restarts=-1, max_concurrency=READS_AT_ONCE, label_selector=here)
        return options.remote(self._pool.child(snapshots.SEGMENTS).uri)

    def _write(self, frozen: Frozen) -> ray.ObjectRef | None:
        if not frozen.parts:
            self._index.saved(frozen.save)
            return None
        me = ray.get_runtime_context().current_actor
        return write_parts.remote(self._pool_uri, frozen.parts, me, frozen.save)

    def _keep_to_budget(self) -> None:
        """Drops labels that storage has; where that is not enough, has the others written there."""
        if self._flush is not None and ray.wait([self._flush], timeout=0)[0]:
            self._flush = None  # it failed, or its word is on the way
        if self._index.evict() and self._flush is None:
            self._flush = self._write(self._index.freeze())


def shard_of(key: str, num_shards: int) -> int:
    """The shard of a key: the same in every process and at every time."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % num_shards


def head_of(label: Label) -> Head:
    """A label without its images."""
    return Head(label.key, label.scores, label.step, label.size_bytes)


@ray.remote(num_cpus=0)
def write_parts(pool_uri: str, parts: Sequence[Part], shard: Any, save: int) -> None:
    """Writes segments one after the other and tells the shard. Raises `StorageError`."""
    folder = locate(pool_uri).child(snapshots.SEGMENTS)
    for part in parts:
        segments.write(folder, part.segment.name, _gathered(folder, part.rows))
    shard.saved.remote(save)


def _gathered(folder: Location, rows: Sequence[Any]) -> Iterator[Label]:
    """The labels of a part in its order, those that only storage has read back segment by segment."""
    by_segment: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if isinstance(row, SegmentRow):
            by_segment[row.segment].append(row.row)
    stored: dict[SegmentRow, Label] = {}
    for name, wanted in by_segment.items():
        wanted.sort()
        stored |= {
            SegmentRow(name, row): label
            for row, label in zip(wanted, segments.read_labels(folder, name, wanted), strict=True)
        }
    for first in range(0, len(rows), LABELS_AT_ONCE):
        some = rows[first : first + LABELS_AT_ONCE]
        held = iter(ray.get([row for row in some if not isinstance(row, SegmentRow)]))
        yield from (stored[row] if isinstance(row, SegmentRow) else next(held) for row in some)
