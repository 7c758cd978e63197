"""Packs: images, and depth maps beside them, in Parquet files of a size that object stores like.

A pack is a folder of shards, a row an image and a row group a row, with `index.parquet`, which is written last. The
index says where in its shard each file's bytes lie, so that training, which takes images in random order, reads one
with a single request and parses nothing. For everybody else the shards are ordinary Parquet.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo

from corun_ray.service.storage import Location, StorageError

INDEX = "index.parquet"
SHARD_FILE = re.compile(r"images-\d{5}-[0-9a-f]{12}(\.index)?\.parquet")
"""A shard, or its part of the index."""
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("depth_key", pa.string()),
        pa.field("depth", pa.binary()),
    ]
)
_PLACE = [("offset", pa.int64()), ("bytes", pa.int64())]
INDEX_SCHEMA = pa.schema(
    [
        *(("shard", pa.int32()), ("key", pa.string()), ("depth_key", pa.string())),
        *((f"{column}_{name}", kind) for column in ("image", "depth") for name, kind in _PLACE),
    ]
)
SHARDS = b"corun_ray.shards"
"""Metadata of an index: a JSON object of every shard's file and its bytes, in the order of the shards."""


class ByteRange(NamedTuple):
    """Where a file's bytes lie."""

    shard: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Pack:
    """What the index of a pack says."""

    folder: Location
    shards: tuple[str, ...]
    """Their files."""
    images: dict[str, ByteRange]
    """By the image's key, its path below the folder that was packed; in that order."""
    depths: dict[str, ByteRange]
    """By the depth map's path below its own folder."""

    def read(self, place: ByteRange) -> bytes:
        """A file; raises the errors of `Location`."""
        return self.folder.child(self.shards[place.shard]).read_range(place.offset, place.num_bytes)


def is_pack(files: Iterable[str]) -> bool:
    """Whether a folder with these files holds a pack, complete or not."""
    return any(SHARD_FILE.fullmatch(file) for file in files)


def open_pack(folder: Location, files: Mapping[str, FileInfo]) -> Pack:
    """The pack in a folder that holds these files.

    Raises `StorageError` for one that is not complete, or whose index or shards are damaged as far as sizes tell.
    """
    again = "run its `corun-ray pack` again"
    if INDEX not in files:
        raise StorageError(f"the pack in {folder.uri} is not complete: no {INDEX}; {again}")
    place = folder.child(INDEX)
    try:
        table = pq.read_table(pa.BufferReader(place.read()))
        table.validate(full=True)
        shards: dict[str, int] = json.loads(table.schema.metadata[SHARDS])
        columns = {name: table[name].to_pylist() for name in INDEX_SCHEMA.names}
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{place.uri} is no index of a pack: {str(error).splitlines()[0][:200]}") from None
    for file, num_bytes in shards.items():
        if file not in files:
            raise StorageError(f"the pack in {folder.uri} is damaged: {file} is missing; {again}")
        if files[file].size != num_bytes:
            raise StorageError(f"the pack in {folder.uri} is damaged: {file} has not {num_bytes} bytes; {again}")
    return Pack(folder, tuple(shards), _places(columns, "key", "image"), _places(columns, "depth_key", "depth"))


def _places(columns: dict[str, list], key: str, column: str) -> dict[str, ByteRange]:
    parts = (columns[key], columns["shard"], *(columns[f"{column}_{name}"] for name, _ in _PLACE))
    return {row[0]: ByteRange(*row[1:]) for row in zip(*parts, strict=True) if row[0] is not None}
