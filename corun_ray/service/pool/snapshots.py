"""Snapshots of a label pool: which segments, in which order, are the pool as it was after a step.

A run keeps its pool in one folder: `segments/`, `step_00000500.json` for each snapshot, and `current.json`, which says
where a shard that comes back must stand. A snapshot's file is written when all of its segments are, so that a crash
leaves the last good one; segments that no snapshot names are deleted by the next sweep.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corun_ray.core.training.labels import Label
from corun_ray.service.pool import segments
from corun_ray.service.pool.index import Head, PoolCounters, Segment, SegmentRow
from corun_ray.service.storage import Location, StorageError

CURRENT_FILE = "current.json"
SEGMENTS = "segments"
FORMAT = 2
INDEXES_AT_ONCE = 16
"""So many requests to an object store hide how long one takes."""
_SNAPSHOT_NAME = re.compile(r"step_(\d{8,})\.json")

SegmentName = Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,100}$")]
Number = Annotated[int, Field(ge=0)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SegmentRecord(_Checked):
    """See `poolindex.Segment`; a name has no separators, so it stays in its folder."""

    name: SegmentName
    order: Number
    rows: Number
    shards: tuple[Number, ...]
    """Those whose labels it holds."""


class CounterRecord(_Checked):
    """See `PoolCounters`, of one shard."""

    offers: Number
    wins: Number
    reads: Number
    hits: Number
    loads: Number
    evictions: Number
    wins_by_step: dict[Annotated[str, Field(pattern=r"^\d{1,15}$")], Number]


class Snapshot(_Checked):
    """The content of a snapshot's file."""

    format: int = Field(FORMAT, ge=FORMAT, le=FORMAT)
    step: Number
    labels: Number
    segments: tuple[SegmentRecord, ...]
    shards: tuple[CounterRecord, ...]


class Current(_Checked):
    """Where the pool of a running job stands: what a shard that was restarted restores."""

    generation: Number
    snapshot: Annotated[str, Field(pattern=r"^step_\d{8,}\.json$")] | None


def name_of(step: int) -> str:
    """The file of the snapshot taken after `step` steps."""
    return f"step_{step:08d}.json"


def step_of(name: str) -> int | None:
    """The inverse of `name_of`; None for other files."""
    match = _SNAPSHOT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def write(
    pool: Location, step: int, labels: int, parts: Iterable[Iterable[Segment]], counters: Iterable[PoolCounters]
) -> None:
    """Makes a snapshot visible, once all its segments are written: one list of segments and counters per shard."""
    shards: defaultdict[Segment, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        for segment in part:
            shards[segment].append(number)
    ordered = sorted(shards, key=lambda segment: (segment.order, segment.name))
    snapshot = Snapshot(
        format=FORMAT,
        step=step,
        labels=labels,
        segments=tuple(SegmentRecord(**segment._asdict(), shards=tuple(shards[segment])) for segment in ordered),
        shards=tuple(_counter_record(shard) for shard in counters),
    )
    pool.child(name_of(step)).write(snapshot.model_dump_json(indent=1).encode())


def read(place: Location) -> Snapshot:
    """A snapshot's file, checked; raises `StorageError`."""
    return _read(place, Snapshot, "snapshot of a label pool")


def write_current(pool: Location, current: Current) -> None:
    """Says where the pool stands."""
    pool.child(CURRENT_FILE).write(current.model_dump_json().encode())


def read_current(pool: Location) -> Current:
    """See `Current`; raises `StorageError`."""
    return _read(pool.child(CURRENT_FILE), Current, "label pool's state")


def index(
    pool: Location, snapshot: Snapshot, some: Iterable[SegmentRecord] | None = None
) -> dict[str, tuple[Head, SegmentRow]]:
    """Every label of a snapshot, or of some of its segments, without images, and where it is; raises `StorageError`."""
    among = snapshot.segments if some is None else some
    in_order = [one.name for one in sorted(among, key=lambda segment: segment.order)]
    found: dict[str, tuple[Head, SegmentRow]] = {}
    with ThreadPoolExecutor(INDEXES_AT_ONCE) as threads:
        indexes = threads.map(functools.partial(segments.read_index, pool.child(SEGMENTS)), in_order)
        for name, heads in zip(in_order, indexes, strict=True):
            found |= {head.key: (head, SegmentRow(name, row)) for row, head in enumerate(heads)}
    return found


def labels(pool: Location, snapshot: Snapshot) -> Iterator[Label]:
    """Every label of a snapshot; raises `StorageError`."""
    rows: dict[str, list[int]] = {}
    for _, place in index(pool, snapshot).values():
        rows.setdefault(place.segment, []).append(place.row)
    for name, wanted in rows.items():
        yield from segments.read_labels(pool.child(SEGMENTS), name, sorted(wanted))


def counters_of_shard(snapshot: Snapshot, number: int, num_shards: int) -> PoolCounters:
    """With what a shard goes on counting: its own counters, or, where shards have changed, all of them on the first."""
    if num_shards == len(snapshot.shards):
        return _counters(snapshot.shards[number])
    return total_counters(snapshot) if number == 0 else PoolCounters()


def segments_of_shard(snapshot: Snapshot, number: int, num_shards: int) -> list[SegmentRecord]:
    """Where a shard has to look for its labels: in its own segments, or, where shards have changed, in all."""
    is_same = num_shards == len(snapshot.shards)
    return [segment for segment in snapshot.segments if not is_same or number in segment.shards]


def total_counters(snapshot: Snapshot) -> PoolCounters:
    """The counters of all shards, added up."""
    return sum(map(_counters, snapshot.shards), PoolCounters())


def sweep(pool: Location, keep: set[str], in_use: Iterable[str]) -> None:
    """Deletes snapshots not among `keep` (file names), and segments that neither they nor `in_use` name.

    `in_use` must be learnt after the files have been listed: it is consumed only then.
    """
    files = pool.list_files()
    named: set[str] = set()
    for file in files:
        if step_of(file) is not None and file not in keep:
            pool.child(file).delete()
        elif file in keep:
            named |= {segment.name for segment in read(pool.child(file)).segments}
    named.update(in_use)
    for file in files:
        folder, _, base = file.rpartition("/")
        if folder == SEGMENTS and base.partition(".")[0] not in named:
            pool.child(file).delete()


def _read(place: Location, model: type[Any], what: str) -> Any:
    try:
        return model.model_validate_json(place.read())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise StorageError(f"{place.uri} is no {what}: {where + ': ' if where else ''}{first['msg']}") from None


def _counter_record(counters: PoolCounters) -> CounterRecord:
    names = [name for name in CounterRecord.model_fields if name != "wins_by_step"]
    by_step = {str(step): wins for step, wins in sorted(counters.wins_by_step.items())}
    return CounterRecord(**{name: getattr(counters, name) for name in names}, wins_by_step=by_step)


def _counters(record: CounterRecord) -> PoolCounters:
    values = record.model_dump()
    by_step = {int(step): wins for step, wins in values.pop("wins_by_step").items()}
    return PoolCounters(**values, wins_by_step=Counter(by_step))
