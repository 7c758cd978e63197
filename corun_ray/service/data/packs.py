"""Packs: images, and depth maps beside them, in Parquet files of a size that object stores serve well.

A pack is a folder of shards and `index.parquet`. A shard has one row, and one row group, for each image. The index is
written last and says where in its shard the bytes of each file lie: training takes images in random order, and so
reads each with a single request and without parsing. For all other readers the shards are ordinary Parquet.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo

from corun_ray.service.errors import format_reason
from corun_ray.service.storage import Location, StorageError

INDEX = "index.parquet"
SHARD_FILE = re.compile(r"images-\d{5}-[0-9a-f]{12}(\.index)?\.parquet")
"""File name of a shard, or of its part of the index."""
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("depth_key", pa.string()),
        pa.field("depth", pa.binary()),
    ]
)
"""Columns of a shard; without a depth map, the last two are null."""
INDEX_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("depth_key", pa.string()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_bytes", pa.int64()),
        pa.field("depth_offset", pa.int64()),
        pa.field("depth_bytes", pa.int64()),
    ]
)
"""Columns of the index; one row for each image."""
SHARDS = b"corun_ray.shards"
"""Metadata of an index: a JSON object, file name → bytes, of all shards in their order."""


class ByteRange(NamedTuple):
    """Where the bytes of a file lie."""

    shard: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Pack:
    """Content of a pack, read from its index."""

    folder: Location
    shards: tuple[str, ...]
    """File names of the shards."""
    images: dict[str, ByteRange]
    """By the image's key, its path below the folder that was packed; in that order."""
    depths: dict[str, ByteRange]
    """By the depth map's path below its own folder."""

    def read(self, place: ByteRange) -> bytes:
        """Read a file of the pack.

        Raises the errors of `Location`.
        """
        return self.folder.child(self.shards[place.shard]).read_range(place.offset, place.num_bytes)


def is_pack(files: Iterable[str]) -> bool:
    """Return whether a folder's files belong to a pack.

    The pack may be incomplete.
    """
    return any(SHARD_FILE.fullmatch(file) for file in files)


def open_pack(folder: Location, files: Mapping[str, FileInfo]) -> Pack:
    """Open the pack in a folder that holds these files.

    Raises `StorageError` for an incomplete pack, a damaged index, and shards that are missing or of another size.
    """
    again = "run its `corun-ray pack` again"
    if INDEX not in files:
        raise StorageError(f"the pack in {folder.uri} is not complete: no {INDEX}; {again}")

    # Read the whole index.
    place = folder.child(INDEX)
    try:
        table = pq.read_table(pa.BufferReader(place.read()))
        table.validate(full=True)
        shards: dict[str, int] = json.loads(table.schema.metadata[SHARDS])
        columns = {name: table[name].to_pylist() for name in INDEX_SCHEMA.names}
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{place.uri} is no index of a pack: {format_reason(error)}") from None

    # Compare the shards with the index, as far as sizes tell.
    for file, num_bytes in shards.items():
        if file not in files:
            raise StorageError(f"the pack in {folder.uri} is damaged: {file} is missing; {again}")
        if files[file].size != num_bytes:
            raise StorageError(f"the pack in {folder.uri} is damaged: {file} has not {num_bytes} bytes; {again}")

    images = _read_ranges(columns, "key", "image")
    depths = _read_ranges(columns, "depth_key", "depth")
    return Pack(folder, tuple(shards), images, depths)


def _read_ranges(columns: dict[str, list], key_column: str, file_column: str) -> dict[str, ByteRange]:
    """Return the byte ranges of a column's files, by key."""
    rows = zip(
        columns[key_column],
        columns["shard"],
        columns[f"{file_column}_offset"],
        columns[f"{file_column}_bytes"],
        strict=True,
    )

    # An image without a depth map has no key for one.
    ranges = {}
    for key, shard, offset, num_bytes in rows:
        if key is not None:
            ranges[key] = ByteRange(shard, offset, num_bytes)

    return ranges
