"""Which saved label pool a person means: snapshot, pool folder, run or checkpoint → one snapshot. No Ray."""

import posixpath
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from corun_ray.config.jobs import ColabatorJob
from corun_ray.config.loading import JobFileError, load_jobs
from corun_ray.core.training.labels import Label
from corun_ray.service.pool import segments, snapshots
from corun_ray.service.pool.index import Head, SegmentRow
from corun_ray.service.pool.snapshots import Snapshot
from corun_ray.service.runs.record import (
    JOB_FILE,
    POOL_FOLDER,
    list_checkpoint_steps,
    name_checkpoint,
    parse_checkpoint_step,
)
from corun_ray.service.storage import Location, StorageError, locate

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by its format."""
MAX_KINDS = 8
"""Kinds of images that are told apart; a run makes only one."""
EXPECTED = "a snapshot (step_00000500.json), a pool folder, a run's folder or a checkpoint's (checkpoint_00000500)"

Index = dict[str, tuple[Head, SegmentRow]]


@dataclass(frozen=True)
class ImageKind:
    """How the images of some labels are stored."""

    labels: int
    height_px: int
    width_px: int
    encoding: str
    with_transmission: bool


@dataclass(frozen=True)
class SavedPool:
    """A saved pool: its folder, and the snapshot in it that is looked at."""

    pool: Location
    name: str
    """The snapshot's file."""
    snapshot: Snapshot

    @property
    def uri(self) -> str:
        """Where the snapshot is."""
        return self.pool.child(self.name).uri

    def index(self) -> Index:
        """Every label without its images, by key; raises `StorageError`."""
        return snapshots.read_index(self.pool, self.snapshot)

    def label(self, key: str, place: SegmentRow) -> Label:
        """One label of the index; raises `StorageError`."""
        folder = self.pool.child(snapshots.SEGMENTS_FOLDER)
        for label in segments.read_labels(folder, place.segment, [place.row]):
            if label.key == key:
                return label
        raise StorageError(f"{segments.locate_images(folder, place.segment).uri}: not the labels that its index names")

    def image_kinds(self, index: Index) -> list[ImageKind]:
        """How the labels' images are stored, the most frequent kind first; raises `StorageError`.

        Labels of one size are of one kind, so that one of each size is read.
        """
        examples = {head.size_bytes: key for key, (head, _) in index.items()}
        kinds = []
        for size, count in Counter(head.size_bytes for head, _ in index.values()).most_common(MAX_KINDS):
            label = self.label(examples[size], index[examples[size]][1])
            _, height_px, width_px = label.scene.shape
            kinds.append(ImageKind(count, height_px, width_px, label.scene.dtype.name, label.transmission is not None))
        return kinds

    def storage_bytes(self) -> int:
        """Size of the files of the snapshot's segments, indices included; raises `StorageError`."""
        names = {segment.name for segment in self.snapshot.segments}
        # Both files of a segment have its name up to the first dot.
        files = entries(self.pool.child(snapshots.SEGMENTS_FOLDER))
        return sum(file.size for file in files if file.base_name.partition(".")[0] in names)

    def job(self) -> ColabatorJob:
        """The job of the run that the pool belongs to; raises `StorageError` where it cannot be known."""
        place = _parent(self.pool).child(JOB_FILE)
        with tempfile.TemporaryDirectory() as folder:
            try:
                jobs = load_jobs(place.download(Path(folder)), env={})
            except JobFileError as error:
                raise StorageError(f"{place.uri}: {error.lines[0].replace(folder, '')}") from None
        if len(jobs) != 1 or not isinstance(jobs[0], ColabatorJob):
            raise StorageError(f"{place.uri}: not one colabator job")
        return jobs[0]


def find(source: str) -> SavedPool:
    """The snapshot that a path or URI means: see `EXPECTED`; the newest of a pool, the last checkpoint's of a run.

    Raises `StorageError`.
    """
    place = locate(source)
    if snapshots.parse_step(place.name) is not None:
        return _open(_parent(place), place.name)
    if parse_checkpoint_step(place.name) is not None:
        return _open(_parent(place).child(POOL_FOLDER), _named_by(place))
    names = [info.base_name for info in entries(place)]
    if place.name == POOL_FOLDER or any(snapshots.parse_step(name) is not None for name in names):
        return _open(place, _newest(place))
    if POOL_FOLDER in names:
        return _of_run(place)
    raise StorageError(f"{place.uri}: no label pool there; expected {EXPECTED}")


def entries(folder: Location) -> list[fs.FileInfo]:
    """What lies right below a folder; nothing where this is no folder. Raises `StorageError`."""
    try:
        if folder.filesystem.get_file_info(folder.path).type == fs.FileType.File:
            return []
        return folder.filesystem.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, "list", error) from None


def snapshots_in(pool: Location) -> list[str]:
    """The files of a pool's snapshots, oldest first; raises `StorageError`."""
    names = (info.base_name for info in entries(pool))
    return sorted((n for n in names if snapshots.parse_step(n) is not None), key=lambda n: snapshots.parse_step(n) or 0)


def _open(pool: Location, name: str) -> SavedPool:
    return SavedPool(pool, name, snapshots.read(pool.child(name)))


def _newest(pool: Location) -> str:
    names = snapshots_in(pool)
    if not names:
        raise StorageError(f"{pool.uri}: no snapshot there (step_00000500.json)")
    return names[-1]


def _of_run(run: Location) -> SavedPool:
    from corun_ray.core.training.checkpoints import TRAINING_FILE

    for step in reversed(list_checkpoint_steps(run)):
        checkpoint = run.child(name_checkpoint(step))
        # A job that is saving right now, or died while it did, has a folder without this file.
        if checkpoint.child(TRAINING_FILE).exists():
            return _open(run.child(POOL_FOLDER), _named_by(checkpoint))
    return _open(run.child(POOL_FOLDER), _newest(run.child(POOL_FOLDER)))


def _named_by(checkpoint: Location) -> str:
    """The snapshot of a checkpoint, a bare file name."""
    name = _record(checkpoint)["extra"].get("pool_snapshot")
    if name is None:
        raise StorageError(f"{checkpoint.uri}: a checkpoint without a label pool")
    if not isinstance(name, str) or snapshots.parse_step(name) is None:
        raise StorageError(
            f"{checkpoint.uri}: names {name!r} as its pool's snapshot, which is none (step_00000500.json)"
        )
    return name


def _record(checkpoint: Location) -> dict[str, Any]:
    from corun_ray.core.training.checkpoints import TRAINING_FILE, CheckpointError, read_record

    with tempfile.TemporaryDirectory() as copy:
        folder = Path(checkpoint.path if checkpoint.is_local else copy)
        if not checkpoint.is_local:
            _copy_header(checkpoint.child(TRAINING_FILE), folder / TRAINING_FILE)
        try:
            return read_record(folder)
        except CheckpointError as error:
            raise StorageError(str(error).replace(str(folder), checkpoint.uri)) from None


def _copy_header(place: Location, file: Path) -> None:
    """A copy of a safetensors file with zeros for its tensors, which a checkpoint has gigabytes of."""
    try:
        with place.filesystem.open_input_file(place.path) as source, file.open("wb") as copy:
            size = source.read(8)
            copy.write(size + source.read(min(int.from_bytes(size, "little"), MAX_HEADER_BYTES)))
            copy.truncate(source.size())
    except (OSError, ValueError) as error:
        raise _unreadable(place, "read", error) from None


def _parent(place: Location) -> Location:
    """The folder that a place is in."""
    # The options of a URI stay at its end.
    uri, mark, options = place.uri.partition("?") if "://" in place.uri else (place.uri, "", "")
    above = posixpath.dirname(uri.rstrip("/"))
    return Location(f"{above}{mark}{options}", place.filesystem, posixpath.dirname(place.path))


def _unreadable(place: Location, verb: str, error: Exception) -> StorageError:
    lines = str(error).strip().splitlines()
    return StorageError(f"cannot {verb} {place.uri}: {lines[0][:300] if lines else type(error).__name__}")
