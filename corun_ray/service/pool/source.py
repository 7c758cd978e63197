"""Find the saved label pool that a person names: a snapshot, pool folder, run or checkpoint. Needs no Ray."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from corun_ray.config.jobs import ColabatorJob
from corun_ray.config.loading import JobFileError, load_jobs
from corun_ray.core.training.checkpoint_record import TRAINING_FILE, CheckpointError, read_record
from corun_ray.core.training.labels import Label
from corun_ray.service.errors import format_reason
from corun_ray.service.pool import segments, snapshots
from corun_ray.service.pool.index import SegmentRow
from corun_ray.service.pool.snapshots import Index, Snapshot
from corun_ray.service.runs.record import (
    JOB_FILE,
    POOL_FOLDER,
    RUN_FILE,
    list_checkpoint_steps,
    name_checkpoint,
    parse_checkpoint_step,
)
from corun_ray.service.storage import Location, StorageError, locate

SAFETENSORS_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""
MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors format allows."""
MAX_IMAGE_KINDS = 8
"""Kinds of images that are distinguished; a run makes a single one."""
EXPECTED_SOURCES = (
    "a snapshot (step_00000500.json), a pool folder, a run's folder or a checkpoint's (checkpoint_00000500)"
)


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
    """A saved pool: its folder, and the snapshot in the folder that is looked at."""

    pool: Location
    name: str
    """File name of the snapshot."""
    snapshot: Snapshot

    @property
    def uri(self) -> str:
        """The place of the snapshot."""
        return self.pool.child(self.name).uri

    def read_index(self) -> Index:
        """Read every label without its images, by key.

        Raises `StorageError`.
        """
        return snapshots.read_index(self.pool, self.snapshot)

    def read_label(self, key: str, segment_row: SegmentRow) -> Label:
        """Read one label of the index.

        Raises `StorageError`.
        """
        folder = self.pool.child(snapshots.SEGMENTS_FOLDER)
        segment, row = segment_row
        for label in segments.read_labels(folder, segment, [row]):
            if label.key == key:
                return label
        raise StorageError(f"{segments.locate_images(folder, segment).uri}: not the labels that its index names")

    def list_image_kinds(self, index: Index) -> list[ImageKind]:
        """List how the labels' images are stored.

        The most frequent kind comes first. Labels of one size are taken as one kind, so one label of each size is read.

        Raises `StorageError`.
        """
        # Choose one label of each size as its example.
        examples = {}
        counts: Counter[int] = Counter()
        for key, (head, _) in index.items():
            examples[head.size_bytes] = key
            counts[head.size_bytes] += 1

        kinds = []
        for size_bytes, count in counts.most_common(MAX_IMAGE_KINDS):
            key = examples[size_bytes]
            _, segment_row = index[key]
            label = self.read_label(key, segment_row)
            _, height_px, width_px = label.scene.shape
            kinds.append(ImageKind(count, height_px, width_px, label.scene.dtype.name, label.transmission is not None))
        return kinds

    def measure_storage_bytes(self) -> int:
        """Add up the sizes of the snapshot's segment files.

        Indexes are included.

        Raises `StorageError`.
        """
        names = {segment.name for segment in self.snapshot.segments}
        total_bytes = 0
        for info in list_entries(self.pool.child(snapshots.SEGMENTS_FOLDER)):
            # Both files of a segment have its name up to the first dot.
            if info.base_name.partition(".")[0] in names:
                total_bytes += info.size
        return total_bytes

    def read_job(self) -> ColabatorJob:
        """Read the job of the pool's run.

        Raises `StorageError` where the job is not known.
        """
        place = self.pool.parent().child(JOB_FILE)
        with tempfile.TemporaryDirectory() as folder:
            try:
                jobs = load_jobs(place.download(Path(folder)), env={})
            except JobFileError as error:
                # Name the file of the run, not its temporary copy.
                raise StorageError(f"{place.uri}: {error.lines[0].replace(folder, '')}") from None

        if len(jobs) != 1 or not isinstance(jobs[0], ColabatorJob):
            raise StorageError(f"{place.uri}: not one colabator job")
        return jobs[0]


def find_saved_pool(source: str) -> SavedPool:
    """Find the snapshot that a path or URI names.

    The source is one of `EXPECTED_SOURCES`. A pool folder gives its newest snapshot; a run gives the snapshot of its
    last checkpoint.

    Raises `StorageError`.
    """
    place = locate(source)

    # The name of a snapshot or checkpoint tells what the place is.
    if snapshots.parse_step(place.name) is not None:
        return _open_snapshot(place.parent(), place.name)
    if parse_checkpoint_step(place.name) is not None:
        return _open_snapshot(place.parent().child(POOL_FOLDER), _read_snapshot_name(place))

    # Any other folder is recognised by its content: snapshots in a pool folder, a pool folder in a run.
    names = [info.base_name for info in list_entries(place)]
    if place.name == POOL_FOLDER or any(snapshots.parse_step(name) is not None for name in names):
        return _open_snapshot(place, _find_newest_snapshot(place))
    if POOL_FOLDER in names:
        return _find_in_run(place)
    if RUN_FILE in names:
        raise StorageError(f"{place.uri}: a run without a label pool; only colabator jobs make one")
    raise StorageError(f"{place.uri}: no label pool there; expected {EXPECTED_SOURCES}")


def list_entries(folder: Location) -> list[fs.FileInfo]:
    """List the files and folders directly below a folder.

    There are none where this is no folder.

    Raises `StorageError`.
    """
    try:
        if folder.filesystem.get_file_info(folder.path).type == fs.FileType.File:
            return []
        return folder.filesystem.get_file_info(fs.FileSelector(folder.path, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot list {folder.uri}: {format_reason(error)}") from None


def list_snapshots(pool: Location) -> list[str]:
    """List the file names of a pool's snapshots, oldest first.

    Raises `StorageError`.
    """
    found = []
    for info in list_entries(pool):
        step = snapshots.parse_step(info.base_name)
        if step is not None:
            found.append((step, info.base_name))
    return [name for _, name in sorted(found)]


def _open_snapshot(pool: Location, name: str) -> SavedPool:
    return SavedPool(pool, name, snapshots.read(pool.child(name)))


def _find_newest_snapshot(pool: Location) -> str:
    names = list_snapshots(pool)
    if not names:
        raise StorageError(f"{pool.uri}: no snapshot there (step_00000500.json); a run saves one with each checkpoint")
    return names[-1]


def _find_in_run(run: Location) -> SavedPool:
    """Open the snapshot of a run's last complete checkpoint.

    Where no checkpoint is complete, this is the newest snapshot.
    """
    pool = run.child(POOL_FOLDER)
    for step in reversed(list_checkpoint_steps(run)):
        checkpoint = run.child(name_checkpoint(step))

        # A checkpoint that is being written, or whose job died meanwhile, is a folder without this file.
        if checkpoint.child(TRAINING_FILE).exists():
            return _open_snapshot(pool, _read_snapshot_name(checkpoint))
    return _open_snapshot(pool, _find_newest_snapshot(pool))


def _read_snapshot_name(checkpoint: Location) -> str:
    """Read which snapshot belongs to a checkpoint.

    The name comes from a file, so it must be the bare name of a snapshot.

    Raises `StorageError`.
    """
    name = _read_checkpoint_record(checkpoint)["extra"].get("pool_snapshot")
    if name is None:
        raise StorageError(f"{checkpoint.uri}: a checkpoint without a label pool")
    if not isinstance(name, str) or snapshots.parse_step(name) is None:
        raise StorageError(
            f"{checkpoint.uri}: names {name!r} as its pool's snapshot, which is none (step_00000500.json)"
        )
    return name


def _read_checkpoint_record(checkpoint: Location) -> dict[str, Any]:
    """Read the record of a checkpoint.

    It is in the header of the checkpoint's file.

    Raises `StorageError`.
    """
    with tempfile.TemporaryDirectory() as copy:
        # Of a checkpoint in an object store, fetch the header alone.
        folder = Path(checkpoint.path if checkpoint.is_local else copy)
        if not checkpoint.is_local:
            _copy_header(checkpoint.child(TRAINING_FILE), folder / TRAINING_FILE)

        try:
            return read_record(folder)
        except CheckpointError as error:
            # Name the checkpoint, not its temporary copy.
            raise StorageError(str(error).replace(str(folder), checkpoint.uri)) from None


def _copy_header(place: Location, file: Path) -> None:
    """Copy a safetensors file with zeros as tensors.

    The tensors of a checkpoint take gigabytes.

    Raises `StorageError`.
    """
    try:
        with place.filesystem.open_input_file(place.path) as source, file.open("wb") as copy:
            # The header, after its length.
            length = source.read(SAFETENSORS_LENGTH_BYTES)
            copy.write(length + source.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES)))

            # A hole of the tensors' size: readers check the length of the file.
            copy.truncate(source.size())
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {place.uri}: {format_reason(error)}") from None
