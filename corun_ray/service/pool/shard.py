"""One shard of the label pool as a Ray actor: a `PoolIndex` with its labels in Ray's object store.

The shard puts each label into the object store itself, and so owns it: labels outlive the worker that made them, are
read in place on their node, pulled between nodes, and spilled to disk where memory runs out. Tasks write the segments
and an actor beside the shard reads labels back from them, so that the shard itself always answers quickly.
"""

import functools
import hashlib
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.actor import ActorProxy

from corun_ray.core.training.labels import Label, Scores
from corun_ray.service.pool import segments, snapshots
from corun_ray.service.pool.index import (
    Entry,
    FrozenIndex,
    Head,
    NewSegment,
    PoolCounters,
    PoolIndex,
    Rejections,
    Segment,
    SegmentRow,
    merge_rejections,
)
from corun_ray.service.pool.segments import CONCURRENT_READS, SegmentReader
from corun_ray.service.storage import Location, StorageError, locate
from corun_ray.service.telemetry import prometheus
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.telemetry.prometheus import NO_JOB, Metric, MetricRecorder

LABELS_AT_ONCE = 32
"""Labels that a writing task fetches at a time; it holds them beside the segment that it makes."""
NOT_RESTORED = (None, 0)
"""Incarnation and saved step of a shard that has yet to restore its labels."""


class Reply(NamedTuple):
    """A shard's answer to a read."""

    incarnation: int | None
    """Which start of the shard's process answers; None while the shard has yet to restore its labels."""
    saved_step: int
    """Labels made before this step are in storage."""
    labels: list[ray.ObjectRef | None]


class ShardSave(NamedTuple):
    """One shard's part in a snapshot under way."""

    kept: list[Segment]
    new: list[Segment]
    written: ray.ObjectRef | None
    """Ready when the new segments are written; None if there are none."""
    counters: PoolCounters
    rejections: Rejections


class PoolShard:
    """Shard `number` of `num_shards`, its segments below `pool_uri`. One call runs at a time.

    `generation` numbers the starts of the worker group. A restored pool stands where the checkpoint stood, and a late
    offer of a dead worker must not change it: calls that name another generation have no effect. `ray.method` gives
    each method's `.remote` its types.
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
        self._telemetry = ShardTelemetry(labels, number)
        self._log = Log("shard", labels, shard=number)
        self._incarnation = time.time_ns()
        self._generation = 0
        self._saved_step = 0
        self._flush: ray.ObjectRef | None = None
        """Writes labels so that they can leave memory; None while no such task runs."""
        # A process that Ray has restarted lost its index. Restore it before the first answer.
        self._has_to_restore = ray.get_runtime_context().was_current_actor_reconstructed

    # --- Calls of the workers ---

    @ray.method
    def read(self, keys: Sequence[str]) -> Reply:
        """Return references to the stored labels of `keys`.

        None where there is no label.
        """
        if not self._ensure_restored():
            return Reply(*NOT_RESTORED, [None] * len(keys))

        # Start to read back what only storage has. The worker that asks waits for these labels; the shard does not.
        entries = self._index.read(keys)
        labels = []
        for entry in entries:
            if entry is not None and entry.payload is None:
                self._load(entry)
            labels.append(None if entry is None else entry.payload)

        self._keep_to_budget()
        self._telemetry.report(self._index.get_counters())
        return Reply(self._incarnation, self._saved_step, labels)

    @ray.method
    def offer(self, generation: int, labels: Sequence[Label]) -> list[bool]:
        """Keep each label that supersedes the stored one.

        Returns for each whether the pool holds it now.
        """
        if not self._ensure_restored() or generation != self._generation:
            return [False] * len(labels)

        # Calls come one at a time, so no other offer can come between a comparison and its set.
        accepted = []
        for label in labels:
            accepted.append(self._index.offer(make_head(label), functools.partial(ray.put, label)))

        self._keep_to_budget()
        self._telemetry.report(self._index.get_counters())
        return accepted

    @ray.method
    def forget(self, generation: int, lost: Sequence[tuple[str, ray.ObjectRef]]) -> None:
        """Drop references that a reader could not fetch.

        The labels are read back from storage, if it has them.
        """
        if generation == self._generation:
            for key, label in lost:
                self._index.forget(key, label)

    @ray.method
    def ping(self) -> tuple[int | None, int]:
        """Return incarnation and saved step, as in a `Reply`.

        All calls made before have been decided.
        """
        return (self._incarnation, self._saved_step) if self._ensure_restored() else NOT_RESTORED

    @ray.method
    def get_counters(self) -> PoolCounters:
        """Return the shard's counters as of now."""
        return self._index.get_counters()

    # --- Calls of the keeper ---

    @ray.method
    def freeze(self, generation: int) -> ShardSave:
        """Fix the shard's content as of now; start its writing.

        A task writes what storage lacks.

        Raises `RuntimeError` for a worker of an earlier generation, and `StorageError` where the shard cannot restore.
        """
        self._restore_if_due()
        self._check_generation(generation)

        # The index keeps its old rows until the task reports that the new segments are written.
        frozen = self._index.freeze()
        written = self._start_writing(frozen)
        new = [segment for segment, _ in frozen.new]
        return ShardSave(frozen.kept, new, written, self._index.get_counters(), self._index.rejections)

    @ray.method
    def mark_saved(self, save_id: int) -> None:
        """Note that the segments of a save are written.

        The task that wrote them calls this.
        """
        self._index.mark_saved(save_id)
        self._flush = None
        self._index.evict()

    @ray.method
    def confirm(self, generation: int, step: int) -> None:
        """Note that the snapshot of `step` is complete.

        Workers need not hold older labels any longer.
        """
        if generation == self._generation:
            self._saved_step = max(self._saved_step, step)

    @ray.method
    def get_segment_names(self, generation: int) -> set[str]:
        """Return the segments that this shard uses or is writing.

        Raises `RuntimeError` for a worker of an earlier generation, and `StorageError` where the shard cannot restore.
        """
        self._restore_if_due()
        self._check_generation(generation)
        return self._index.get_segment_names()

    @ray.method
    def restore(self, snapshot: str | None, generation: int, rejections: Mapping[str, Scores]) -> int:
        """Replace the shard's content by its part of a snapshot, without the labels of `rejections`.

        None stands for an empty pool. Returns the number of labels that leave the pool as rejected. From now on, only
        calls of this `generation` count.

        Raises `StorageError`.
        """
        return self._restore(snapshot, generation, rejections)

    # --- Restoring ---

    def _restore(self, snapshot: str | None, generation: int, rejections: Mapping[str, Scores]) -> int:
        """Restore the index; labels follow when they are read."""
        if snapshot is None:
            num_rejected = self._index.restore((), (), rejections=self._select_rejections(rejections))
            self._saved_step = 0
        else:
            # Read the indexes of the segments that can hold labels of this shard. If the pool was saved by another
            # number of shards, these are all segments.
            content = snapshots.read(self._pool.child(snapshot))
            records = snapshots.select_segments(content, self._number, self._num_shards)
            index = snapshots.read_index(self._pool, content, records)

            num_unrated = snapshots.drop_unrated(index)
            if num_unrated:
                self._log.warning("labels without a finite score left the pool", labels=num_unrated)

            # Take the labels whose keys fall to this shard.
            rows = []
            for key, row in index.items():
                if assign_shard(key, self._num_shards) == self._number:
                    rows.append(row)

            # Put them in place of what the shard held. Labels that are the same keep their place in memory.
            counters = snapshots.select_counters(content, self._number, self._num_shards)
            kept = [Segment(record.name, record.order, record.rows) for record in records]
            rejected_before = snapshots.parse_rejections(content.rejected)
            rejections = self._select_rejections(merge_rejections(rejected_before, rejections))
            num_rejected = self._index.restore(kept, rows, counters, rejections)
            self._saved_step = content.step

        # Only now: had storage failed above, the next call would try again.
        self._generation, self._has_to_restore = generation, False
        self._telemetry.report_restore(self._index.get_counters())
        self._log.info(
            "label pool restored", snapshot=snapshot or "none", labels=len(self._index), rejected=num_rejected
        )
        return num_rejected

    def _select_rejections(self, rejections: Mapping[str, Scores]) -> Rejections:
        """Select the rejections of this shard's keys."""
        selected = {}
        for key, scores in rejections.items():
            if assign_shard(key, self._num_shards) == self._number:
                selected[key] = scores
        return selected

    def _restore_if_due(self) -> None:
        """Restore a restarted shard from what `current.json` names.

        Raises `StorageError`.
        """
        if self._has_to_restore:
            current = snapshots.read_current(self._pool)
            self._restore(current.snapshot, current.generation, snapshots.parse_rejections(current.rejected))

    def _ensure_restored(self) -> bool:
        """Restore if due; return whether the shard is whole.

        It is not while storage is out of reach: workers then continue without its labels.
        """
        try:
            self._restore_if_due()
        except StorageError:
            return False
        return True

    def _check_generation(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError(f"label pool: generation {generation} of the workers is over, {self._generation} runs")

    # --- Storage and memory ---

    @property
    def _pool(self) -> Location:
        return locate(self._pool_uri)

    @functools.cached_property
    def _reader(self) -> Any:
        """The `SegmentReader` actor on the shard's node.

        The shard owns what it reads; it ends with the shard.
        """
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        reader = ray.remote(SegmentReader).options(
            num_cpus=0, max_restarts=-1, max_concurrency=CONCURRENT_READS, label_selector=here
        )
        return reader.remote(self._pool.child(snapshots.SEGMENTS_FOLDER).uri)

    def _load(self, entry: Entry) -> None:
        """Start reading a label back from storage.

        Its payload is a reference to the result.
        """
        assert entry.segment_row is not None
        self._index.attach(entry.head.key, self._reader.read.remote(*entry.segment_row))
        self._index.counters.loads += 1

    def _start_writing(self, frozen: FrozenIndex) -> ray.ObjectRef | None:
        """Start a task that writes the new segments.

        Returns None where there are none.
        """
        if not frozen.new:
            self._index.mark_saved(frozen.save_id)
            return None
        me = ray.get_runtime_context().current_actor
        return write_segments.remote(self._pool_uri, frozen.new, me, frozen.save_id)

    def _keep_to_budget(self) -> None:
        """Drop saved labels from memory until the budget holds.

        Where that is not enough, the other labels are written to storage.
        """
        # A flush that has ended is over, whether it failed or its report is on the way.
        if self._flush is not None and ray.wait([self._flush], timeout=0)[0]:
            self._flush = None

        if self._index.evict() and self._flush is None:
            self._flush = self._start_writing(self._index.freeze())


def assign_shard(key: str, num_shards: int) -> int:
    """Return the number of a key's shard.

    It is the same in every process and at every time.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % num_shards


def make_head(label: Label) -> Head:
    """Return a label without its images."""
    return Head(label.key, label.scores, label.step, label.size_bytes)


# --- Writing segments ---


@ray.remote(num_cpus=0)
def write_segments(
    pool_uri: str, new_segments: Sequence[NewSegment], shard: ActorProxy[PoolShard], save_id: int
) -> None:
    """Write segments one by one, then report to the shard.

    Raises `StorageError`.
    """
    folder = locate(pool_uri).child(snapshots.SEGMENTS_FOLDER)
    for segment, rows in new_segments:
        segments.write(folder, segment.name, _gather_labels(folder, rows))
    shard.mark_saved.remote(save_id)


def _gather_labels(folder: Location, rows: Sequence[Any]) -> Iterator[Label]:
    """Yield the labels of a new segment, row by row."""
    # Labels that only storage has are read back first, each old segment once.
    stored = _read_rows(folder, [row for row in rows if isinstance(row, SegmentRow)])

    # Labels in memory are fetched a few at a time, so that this task never holds all of them beside their segment.
    for first in range(0, len(rows), LABELS_AT_ONCE):
        batch = rows[first : first + LABELS_AT_ONCE]
        fetched = iter(ray.get([row for row in batch if not isinstance(row, SegmentRow)]))
        for row in batch:
            yield stored[row] if isinstance(row, SegmentRow) else next(fetched)


def _read_rows(folder: Location, rows: Iterable[SegmentRow]) -> dict[SegmentRow, Label]:
    """Read labels from their rows, segment by segment."""
    rows_by_segment: defaultdict[str, list[int]] = defaultdict(list)
    for segment, row in rows:
        rows_by_segment[segment].append(row)

    labels = {}
    for segment, numbers in rows_by_segment.items():
        numbers.sort()
        for number, label in zip(numbers, segments.read_labels(folder, segment, numbers), strict=True):
            labels[SegmentRow(segment, number)] = label
    return labels


# --- Metrics ---


class ShardTelemetry:
    """The Prometheus metrics of one shard, from the counters that it keeps anyway."""

    def __init__(self, labels: Mapping[str, str], number: int) -> None:
        self._recorder = MetricRecorder(labels, shard=str(number))

    def report(self, counters: PoolCounters) -> None:
        """Report the shard as of now."""
        self._recorder.set(prometheus.POOL_LABELS, counters.labels)
        self._recorder.set(prometheus.POOL_BYTES, counters.resident_bytes)
        for metric, total in _list_totals(counters).items():
            self._recorder.advance(metric, total)

    def report_restore(self, counters: PoolCounters) -> None:
        """Report a restored shard.

        Earlier processes have reported the totals from which its counters start.
        """
        for metric, total in _list_totals(counters).items():
            self._recorder.skip(metric, total)
        self._recorder.add(prometheus.POOL_RESTORES)
        self.report(counters)


def _list_totals(counters: PoolCounters) -> dict[Metric, int]:
    return {
        prometheus.POOL_OFFERS: counters.offers,
        prometheus.POOL_WINS: counters.wins,
        prometheus.POOL_READS: counters.reads,
        prometheus.POOL_HITS: counters.hits,
    }
