"""Snapshots of a label pool: the segments that are the pool as it was after one step, and their order.

A run keeps its pool in one folder: `segments/`, one `step_00000500.json` for each snapshot, and `current.json`, which
tells a restarted shard what to restore. The file of a snapshot is written after all of its segments, so that a crash
leaves the last good snapshot. Segments that no snapshot names are deleted by the next sweep.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corun_ray.core.training.labels import Label, Scores
from corun_ray.service.pool import segments
from corun_ray.service.pool.index import Head, PoolCounters, Rejections, Segment, SegmentRow, is_rejected
from corun_ray.service.storage import DamagedFile, Location

CURRENT_FILE = "current.json"
SEGMENTS_FOLDER = "segments"
FORMAT = 2
CONCURRENT_INDEX_READS = 16
"""Requests to an object store under way: enough to hide how long a single one takes."""
_SNAPSHOT_NAME = re.compile(r"step_(\d{8,})\.json")

Index = dict[str, tuple[Head, SegmentRow]]
"""Labels without their images, by key, and the rows that hold them."""
SegmentName = Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,100}$")]
Number = Annotated[int, Field(ge=0)]
Score = Annotated[float, Field(allow_inf_nan=False)]


class CheckedModel(BaseModel):
    """The content of a JSON file of a pool: every field is checked, and no other is accepted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SegmentRecord(CheckedModel):
    """An `index.Segment` as a snapshot names it. The name has no separators, so it cannot lead out of its folder."""

    name: SegmentName
    order: Number
    rows: Number
    shards: tuple[Number, ...]
    """Numbers of the shards whose labels it holds."""


class CounterRecord(CheckedModel):
    """The `PoolCounters` of one shard that outlive a restart."""

    offers: Number
    wins: Number
    reads: Number
    hits: Number
    loads: Number
    evictions: Number
    wins_by_step: dict[Annotated[str, Field(pattern=r"^\d{1,15}$")], Number]


class RejectionRecord(CheckedModel):
    """A rejected label: only a better label of its image counts, whatever the segments hold."""

    key: str
    clarity: Score
    quality: Score


class Snapshot(CheckedModel):
    """The content of a snapshot's file."""

    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)
    step: Number
    labels: Number
    segments: tuple[SegmentRecord, ...]
    shards: tuple[CounterRecord, ...]
    rejected: tuple[RejectionRecord, ...] = ()


class Current(CheckedModel):
    """The content of `current.json`: what a restarted shard of a running job restores."""

    generation: Number
    snapshot: Annotated[str, Field(pattern=r"^step_\d{8,}\.json$")] | None
    rejected: tuple[RejectionRecord, ...] = ()
    """Labels rejected in review, which leave the pool beside those that the snapshot rejects."""


# --- Files of a pool ---


def format_name(step: int) -> str:
    """Return the file name of a step's snapshot."""
    return f"step_{step:08d}.json"


def parse_step(name: str) -> int | None:
    """Return the step of a snapshot's file name.

    None for any other file.
    """
    match = _SNAPSHOT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def write(
    pool: Location,
    step: int,
    labels: int,
    segments_by_shard: Iterable[Iterable[Segment]],
    counters: Iterable[PoolCounters],
    rejections: Mapping[str, Scores] | None = None,
) -> None:
    """Write the snapshot of a step, which makes it visible.

    All of its segments must be written before. `segments_by_shard` and `counters` have one item a shard. Segments may
    hold labels of `rejections`.

    Raises `StorageError`.
    """
    # Several shards may name the same segment, once their number has changed: list it once, with all of its shards.
    shards_of: defaultdict[Segment, list[int]] = defaultdict(list)
    for number, named in enumerate(segments_by_shard):
        for segment in named:
            shards_of[segment].append(number)

    # Sort by order: if two segments hold the same key, the later one is right.
    records = []
    for segment in sorted(shards_of, key=lambda segment: (segment.order, segment.name)):
        records.append(SegmentRecord(**segment._asdict(), shards=tuple(shards_of[segment])))

    # One small file, replaced as a whole: a reader never sees half of a snapshot.
    snapshot = Snapshot(
        format=FORMAT,
        step=step,
        labels=labels,
        segments=tuple(records),
        shards=tuple(_make_counter_record(shard) for shard in counters),
        rejected=make_rejection_records(rejections or {}),
    )

    # A pool without rejected labels stays readable for versions that know none.
    without = None if snapshot.rejected else {"rejected"}
    pool.child(format_name(step)).write(snapshot.model_dump_json(indent=1, exclude=without).encode())


def read(place: Location) -> Snapshot:
    """Read and check a snapshot's file.

    Raises `StorageError`.
    """
    return read_model(place, Snapshot, "snapshot of a label pool")


def write_current(pool: Location, current: Current) -> None:
    """Write what a restarted shard restores from now on.

    Raises `StorageError`.
    """
    pool.child(CURRENT_FILE).write(current.model_dump_json().encode())


def read_current(pool: Location) -> Current:
    """Read what a restarted shard restores.

    Raises `StorageError`.
    """
    return read_model(pool.child(CURRENT_FILE), Current, "label pool's state")


def make_rejection_records(rejections: Mapping[str, Scores]) -> tuple[RejectionRecord, ...]:
    """Return rejections as a file's records, sorted by key."""
    records = []
    for key, scores in sorted(rejections.items()):
        records.append(RejectionRecord(key=key, **scores._asdict()))
    return tuple(records)


def parse_rejections(records: Iterable[RejectionRecord]) -> Rejections:
    """Return the rejections of a file's records."""
    return {record.key: Scores(record.clarity, record.quality) for record in records}


def read_model(place: Location, model: type[Any], kind: str) -> Any:
    """Read a JSON file into a pydantic model.

    Raises `StorageError` for the first mistake.
    """
    try:
        return model.model_validate_json(place.read())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{key}: {first['msg']}" if key else first["msg"]
        raise DamagedFile(f"{place.uri} is no {kind}: {reason}") from None


# --- Content of a snapshot ---


def drop_unrated(index: Index) -> int:
    """Drop the labels whose scores are not finite, and return their number.

    An earlier version may have saved some. No candidate would be as good as NaN, so they would stay for ever.
    """
    unrated = [key for key, (head, _) in index.items() if not all(map(math.isfinite, head.scores))]
    for key in unrated:
        del index[key]
    return len(unrated)


def read_index(pool: Location, snapshot: Snapshot, records: Iterable[SegmentRecord] | None = None) -> Index:
    """Read the labels of a snapshot without their images.

    `records` selects some of its segments.

    Raises `StorageError`.
    """
    records = snapshot.segments if records is None else records
    names = [record.name for record in sorted(records, key=lambda record: record.order)]

    # Read many indexes at once, and merge them in order: the later segment is right.
    index: Index = {}
    with ThreadPoolExecutor(CONCURRENT_INDEX_READS) as threads:
        read_one = functools.partial(segments.read_index, pool.child(SEGMENTS_FOLDER))
        for name, heads in zip(names, threads.map(read_one, names), strict=True):
            for row, head in enumerate(heads):
                index[head.key] = (head, SegmentRow(name, row))

    # Segments are never changed: they may still hold labels that were rejected, or older ones of the same images.
    rejections = parse_rejections(snapshot.rejected)
    for key in rejections:
        if key in index and is_rejected(index[key][0], rejections):
            del index[key]
    return index


def read_labels(pool: Location, snapshot: Snapshot) -> Iterator[Label]:
    """Read every label of a snapshot, segment by segment.

    Raises `StorageError`.
    """
    # The index leaves out the rows that a later segment has superseded.
    rows_by_segment: defaultdict[str, list[int]] = defaultdict(list)
    for _, (segment, row) in read_index(pool, snapshot).values():
        rows_by_segment[segment].append(row)

    for segment, rows in rows_by_segment.items():
        yield from segments.read_labels(pool.child(SEGMENTS_FOLDER), segment, sorted(rows))


def select_segments(snapshot: Snapshot, number: int, num_shards: int) -> list[SegmentRecord]:
    """Select the segments with labels of shard `number`.

    All segments, if the pool had another number of shards: its labels are spread over the shards again.
    """
    if num_shards != len(snapshot.shards):
        return list(snapshot.segments)

    records = []
    for record in snapshot.segments:
        if number in record.shards:
            records.append(record)
    return records


def select_counters(snapshot: Snapshot, number: int, num_shards: int) -> PoolCounters:
    """Return the counters with which shard `number` of `num_shards` resumes.

    They are its own or, if the pool had another number of shards, the sum of all on shard 0 and zero elsewhere.
    """
    if num_shards == len(snapshot.shards):
        return _parse_counters(snapshot.shards[number])
    return sum_counters(snapshot) if number == 0 else PoolCounters()


def sum_counters(snapshot: Snapshot) -> PoolCounters:
    """Add up the counters of all shards."""
    total = PoolCounters()
    for record in snapshot.shards:
        total += _parse_counters(record)
    return total


# --- Deleting ---


def sweep(pool: Location, keep: set[str], in_use: Iterable[str]) -> None:
    """Delete snapshots and segments that are not needed.

    Needed are the snapshots of `keep` (file names), and the segments named there or by `in_use`. `in_use` yields names
    of segments and must ask for them only when it is consumed, which is after the listing: a segment begun in between
    is then not in the listing, so it cannot be deleted.

    Raises `StorageError`.
    """
    files = pool.list_files()

    # Delete old snapshots first, then segments: a crash in between leaves unnamed segments for the next sweep, but no
    # snapshot without its segments.
    needed: set[str] = set()
    for file in files:
        if file in keep:
            for record in read(pool.child(file)).segments:
                needed.add(record.name)
        elif parse_step(file) is not None:
            pool.child(file).delete()

    # Shards also need the segments that no snapshot names yet.
    needed.update(in_use)

    # Both files of a segment have its name up to the first dot.
    for file in files:
        folder, _, base = file.rpartition("/")
        if folder == SEGMENTS_FOLDER and base.partition(".")[0] not in needed:
            pool.child(file).delete()


def _make_counter_record(counters: PoolCounters) -> CounterRecord:
    totals = {}
    for name in CounterRecord.model_fields:
        totals[name] = getattr(counters, name)

    # Keys of JSON are strings.
    totals["wins_by_step"] = {str(step): wins for step, wins in sorted(counters.wins_by_step.items())}
    return CounterRecord(**totals)


def _parse_counters(record: CounterRecord) -> PoolCounters:
    totals = record.model_dump()
    totals["wins_by_step"] = Counter({int(step): wins for step, wins in record.wins_by_step.items()})
    return PoolCounters(**totals)
