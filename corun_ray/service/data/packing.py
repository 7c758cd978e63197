"""Packing: a folder or URI of images, and perhaps their depth, into a pack (see `packs`), by tasks on the cluster.

Beside each shard stands its part of the index, written after it. A shard's name follows from what goes into it: so
packing that was stopped goes on with the shards that are missing, packing again writes only those that changed, and
until the new index takes the place of the old one, the old pack is whole.


The plan of a pack: which images, with which depth, go into which of its shards."""

import hashlib
import io
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow.fs import FileInfo
from ray.data import DataContext

from corun_ray.core.data.images import BadImage, decode_depth
from corun_ray.service.data.actors import iterate_rows
from corun_ray.service.data.manifest import (
    DEPTH_SUFFIXES,
    ManifestError,
    filter_by_suffix,
    list_image_files,
    pair_by_stem,
    strip_suffix,
)
from corun_ray.service.data.packs import INDEX, INDEX_SCHEMA, SCHEMA, SHARD_FILE, SHARDS
from corun_ray.service.storage import Location, MissingFile, StorageError, locate

FORMAT = 1


@dataclass(frozen=True)
class PackEntry:
    """One image to be packed."""

    key: str
    depth_key: str | None
    num_bytes: int
    """Of both files."""
    changed_ns: int
    """When the newer of them was written."""


@dataclass(frozen=True)
class PackPlan:
    """What goes where."""

    images: str
    depth: str | None
    output: str
    keep_png: bool
    shards: tuple[tuple[PackEntry, ...], ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """URI → reason, of images without a depth map and of depth maps without an image."""

    def shard_name(self, shard: int) -> str:
        """Of its file, without the suffix: another one for any other content, as far as sizes and dates tell."""
        content = [FORMAT, self.images, self.depth, self.keep_png]
        content += [(one.key, one.depth_key, one.num_bytes, one.changed_ns) for one in self.shards[shard]]
        return f"images-{shard:05d}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"

    @property
    def num_images(self) -> int:
        """In all shards."""
        return sum(map(len, self.shards))

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(source.num_bytes for shard in self.shards for source in shard)


def plan_pack(images: str, output: str, depth: str | None, shard_mib: int, keep_png: bool) -> PackPlan:
    """Lists, pairs and cuts; raises `StorageError` and `ManifestError`."""
    files, maps, skipped = list_image_files(images, "IMAGES"), {}, {}
    keys: dict[str, str | None] = dict.fromkeys(files)
    if depth is not None:
        maps = locate(depth).list_infos()
        named = filter_by_suffix([*maps], DEPTH_SUFFIXES)
        pairs, unpaired, unused = pair_by_stem([*keys], named, "depth map")
        if not pairs:
            raise ManifestError(f"--depth: none of the {len(named)} depth maps below {depth} matches an image")
        keys = dict(pairs)
        skipped = {posixpath.join(images, key): reason for key, reason in unpaired.items()}
        skipped |= {posixpath.join(depth, key): reason for key, reason in unused.items()}
    sources = []
    for key, depth_key in keys.items():
        infos = [files[key]] if depth_key is None else [files[key], maps[depth_key]]
        sources.append(
            PackEntry(key, depth_key, sum(info.size for info in infos), max(info.mtime_ns or 0 for info in infos))
        )
    return PackPlan(images, depth, output, keep_png, tuple(_cut(sources, shard_mib * 2**20)), skipped)


def _cut(sources: list[PackEntry], shard_bytes: int) -> Iterator[tuple[PackEntry, ...]]:
    shard: list[PackEntry] = []
    num_bytes = 0
    for source in sources:
        if shard and num_bytes + source.num_bytes > shard_bytes:
            yield tuple(shard)
            shard, num_bytes = [], 0
        shard.append(source)
        num_bytes += source.num_bytes
    yield tuple(shard)


READS_AT_ONCE = 8
"""Files that a task asks a store for at once: it waits for answers more than it works."""
_SKIPPED_KEY = b"corun_ray.left_out"


@dataclass(frozen=True)
class PackResult:
    """What became of the images."""

    images: int
    shards: int
    num_bytes: int
    """Of all shards."""
    skipped: dict[str, str]
    """URI → reason."""


def find_written_shards(plan: PackPlan) -> set[int]:
    """Which shards an earlier packing has written whole, with all files that the plan has for them.

    Raises `StorageError` where the output holds other things.
    """
    output = locate(plan.output)
    files = output.list_infos() if output.exists() else {}
    for file in files:
        if file != INDEX and not SHARD_FILE.fullmatch(file):
            raise StorageError(f"{plan.output} holds {file}, which is no part of a pack: choose an empty place")
    return {shard for shard in range(len(plan.shards)) if _is_there(plan.shard_name(shard), output, files)}


def _is_there(name: str, output: Location, files: Mapping[str, FileInfo]) -> bool:
    if not {_images(name), _part(name)} <= files.keys():
        return False
    try:
        metadata = pq.read_schema(pa.BufferReader(output.child(_part(name)).read())).metadata or {}
    except pa.ArrowException:
        return False
    # What could not be read then may be readable now.
    whole = {SHARDS: json.dumps({_images(name): files[_images(name)].size}), _SKIPPED_KEY: json.dumps({})}
    return all(metadata.get(key) == text.encode() for key, text in whole.items())


def pack(plan: PackPlan, there: set[int], progress: Callable[[int, int], None]) -> PackResult:
    """Writes the shards that are not `there`, then the index; `progress` is told images done and their number.

    Files that cannot be read are left out, with the reason. Raises `StorageError`.
    """
    done = sum(len(plan.shards[shard]) for shard in there)
    progress(done, plan.num_images)
    missing = [shard for shard in range(len(plan.shards)) if shard not in there]
    if missing:
        DataContext.get_current().enable_progress_bars = False
        items = ray.data.from_items(missing, override_num_blocks=len(missing))
        written = iterate_rows(items.map(_write_shard, fn_args=(ray.put(plan),)))  # type: ignore[arg-type]  # as in streams
        for row in written:
            done += len(plan.shards[row["item"]])
            progress(done, plan.num_images)
    return write_index(plan)


def pack_here(plan: PackPlan) -> PackResult:
    """Writes everything in this process, without Ray. Raises `StorageError`."""
    for shard in range(len(plan.shards)):
        write_shard(plan, shard)
    return write_index(plan)


def _write_shard(row: dict[str, int], plan: "ray.ObjectRef[PackPlan]") -> dict[str, int]:
    write_shard(ray.get(plan), row["item"])
    return row


def write_shard(plan: PackPlan, shard: int) -> None:
    """Writes one shard, then its part of the index; raises `StorageError`."""
    output, name, buffer = locate(plan.output), plan.shard_name(shard), io.BytesIO()
    entries, skipped = [], {}
    # Images are compressed already; and uncompressed, a file's bytes are a range of the shard's.
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with ThreadPoolExecutor(READS_AT_ONCE) as readers, pq.ParquetWriter(buffer, SCHEMA, **options) as writer:
        for source, row in zip(plan.shards[shard], readers.map(partial(_row, plan), plan.shards[shard]), strict=True):
            if isinstance(row, str):
                skipped[posixpath.join(plan.images, source.key)] = row
                continue
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
            entries.append({"shard": shard} | _entry(row))
    content = buffer.getvalue()
    _add_offsets(entries, content)
    output.child(_images(name)).write(content)
    metadata = {SHARDS: json.dumps({_images(name): len(content)}), _SKIPPED_KEY: json.dumps(skipped)}
    _write_table(entries, metadata, output.child(_part(name)))


def _row(plan: PackPlan, source: PackEntry) -> dict[str, str | bytes] | str:
    """A row of a shard, or the reason why there is none."""
    try:
        row: dict[str, str | bytes] = {"key": source.key, "image": locate(plan.images).child(source.key).read()}
        return row if source.depth_key is None else row | _depth_of(plan, source.depth_key)
    except (BadImage, MissingFile) as error:
        return str(error)


def _depth_of(plan: PackPlan, key: str) -> dict[str, str | bytes]:
    assert plan.depth is not None
    content, suffix = locate(plan.depth).child(key).read(), posixpath.splitext(key)[1].lower()
    if suffix != ".png" or plan.keep_png:
        return {"depth_key": key, "depth": content}
    try:
        return {"depth_key": f"{strip_suffix(key)}.npy", "depth": _as_npy(decode_depth(content, suffix))}
    except BadImage as error:
        raise BadImage(f"its depth map {posixpath.join(plan.depth, key)}: {error}") from None


def _as_npy(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels))
    return buffer.getvalue()


def _entry(row: dict) -> dict:
    """Of the index; all but the offsets, which are known when the shard is closed."""
    entry = {"key": row["key"], "depth_key": row.get("depth_key")}
    for column in ("image", "depth"):
        if column in row:
            entry |= {f"{column}_bytes": len(row[column])}
    return entry


def _add_offsets(entries: list[dict], content: bytes) -> None:
    """A value is the end of its column's chunk, which holds nothing else; its length, before it, shows that it is so.

    Source: Apache Parquet, encodings, PLAIN of a byte array.
    """
    metadata = pq.read_metadata(pa.BufferReader(content))
    for number, entry in enumerate(entries):
        for column in ("image", "depth"):
            if f"{column}_bytes" not in entry:
                continue
            chunk = metadata.row_group(number).column(SCHEMA.get_field_index(column))
            num_bytes = entry[f"{column}_bytes"]
            offset = chunk.data_page_offset + chunk.total_compressed_size - num_bytes
            if int.from_bytes(content[offset - 4 : offset], "little") != num_bytes:
                raise RuntimeError(f"pyarrow {pa.__version__} lays out Parquet in another way than expected")
            entry[f"{column}_offset"] = offset


def write_index(plan: PackPlan) -> PackResult:
    """Joins the parts of the index, then deletes what other shards there are; raises `StorageError`."""
    output, names = locate(plan.output), [plan.shard_name(shard) for shard in range(len(plan.shards))]
    tables = [pq.read_table(pa.BufferReader(output.child(_part(name)).read())) for name in names]
    skipped, shards = dict(plan.skipped), dict[str, int]()
    for table in tables:
        skipped |= json.loads(table.schema.metadata[_SKIPPED_KEY])
        shards |= json.loads(table.schema.metadata[SHARDS])
    entries = [entry for table in tables for entry in table.to_pylist()]
    if not entries:
        raise StorageError(f"not one of the images below {plan.images} can be packed")
    _write_table(entries, {SHARDS: json.dumps(shards)}, output.child(INDEX))
    ours = {INDEX, *map(_images, names), *map(_part, names)}
    for file in output.list_infos().keys() - ours:
        output.child(file).delete()
    return PackResult(len(entries), len(shards), sum(shards.values()), skipped)


def _images(name: str) -> str:
    return f"{name}.parquet"


def _part(name: str) -> str:
    return f"{name}.index.parquet"


def _write_table(entries: list[dict], metadata: dict[bytes, str], place: Location) -> None:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(entries, schema=INDEX_SCHEMA.with_metadata(metadata))
    pq.write_table(table, buffer, compression="zstd")
    place.write(buffer.getvalue())
