"""Packing: write a folder or URI of images, and perhaps their depth maps, as a pack (see `packs`).

Tasks on the cluster write the shards. Beside each shard stands its part of the index, written after it. The name of a
shard follows from its content, with two consequences. Packing that was stopped resumes with the shards that are
missing, and packing again writes only the shards that changed. And the old pack stays whole until the new index
replaces the old one.
"""

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
from corun_ray.service.data.listing import DEPTH_SUFFIXES, IMAGE_SUFFIXES, ManifestError, list_folder
from corun_ray.service.data.manifest import list_image_folder
from corun_ray.service.data.packs import INDEX, INDEX_SCHEMA, SCHEMA, SHARD_FILE, SHARDS
from corun_ray.service.data.pairing import pair_by_stem, strip_suffix
from corun_ray.service.places import find_below
from corun_ray.service.runs.lease import DRIVERS_FOLDER
from corun_ray.service.storage import Location, MissingFile, StorageError, locate

FORMAT = 1
"""Version of the shards' format; another version gives them other names."""
MIB = 2**20
PARALLEL_READS = 8
"""Files that a task reads at once: it waits for the store more than it works."""
SKIPPED_KEY = b"corun_ray.left_out"
"""Metadata of a shard's part of the index: a JSON object, URI → reason, of images that could not be packed."""


# --- The plan ---


@dataclass(frozen=True)
class PackEntry:
    """One image to be packed."""

    key: str
    depth_key: str | None
    num_bytes: int
    """Size of the image and its depth map."""
    changed_ns: int
    """When the newer of the two was written."""


@dataclass(frozen=True)
class PackPlan:
    """Which images, with which depth maps, go into which shards of a pack."""

    images: str
    depth: str | None
    output: str
    keep_png: bool
    shards: tuple[tuple[PackEntry, ...], ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """URI → reason, of images without a depth map, depth maps without an image, and links that lead nowhere."""
    passed_over: str = ""
    """Files of other kinds among the images, by number: `.heic 2, .txt 1`."""

    def name_shard(self, shard: int) -> str:
        """Return a shard's file name, without suffix.

        The name follows from the shard's content.

        Content counts as changed where sizes or dates differ.
        """
        content: list[Any] = [FORMAT, self.images, self.depth, self.keep_png]
        for entry in self.shards[shard]:
            content.append((entry.key, entry.depth_key, entry.num_bytes, entry.changed_ns))
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return f"images-{shard:05d}-{digest[:12]}"

    @property
    def num_images(self) -> int:
        """Number of images in all shards."""
        return sum(len(shard) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all files to be packed."""
        return sum(entry.num_bytes for shard in self.shards for entry in shard)


def plan_pack(images: str, output: str, depth: str | None, shard_mib: int, keep_png: bool) -> PackPlan:
    """List the images and cut them into shards.

    With `depth`, each image is paired with its depth map.

    Raises `StorageError` and `ManifestError`.
    """
    # A pack below the images is none of them; `find_written_shards` refuses the folder of the images itself.
    is_same = find_below(locate(output), locate(images)) == ""
    outputs = {} if is_same else {"OUT": output}
    found = list_image_folder(images, "IMAGES", outputs)
    files = found.select(IMAGE_SUFFIXES)
    if found.root != locate(images).uri:
        images = found.root  # of the one image that was named
    skipped, passed_over = found.list_skipped(IMAGE_SUFFIXES), found.count_others(IMAGE_SUFFIXES)
    if depth is None:
        entries = [_make_entry(key, files[key]) for key in files]
        shards = tuple(_cut_into_shards(entries, shard_mib * MIB))
        return PackPlan(images, None, output, keep_png, shards, skipped, passed_over)

    # Pair the images with their depth maps.
    maps = list_folder(depth, "--depth", outputs).select(DEPTH_SUFFIXES)
    pairing = pair_by_stem(list(files), list(maps), "depth map")
    if not pairing.pairs:
        raise ManifestError(f"--depth: none of the {len(maps)} depth maps below {depth} matches an image")

    entries = [_make_entry(key, files[key], map_key, maps[map_key]) for key, map_key in pairing.pairs.items()]
    shards = tuple(_cut_into_shards(entries, shard_mib * MIB))
    skipped |= pairing.list_skipped(images, depth)
    return PackPlan(images, depth, output, keep_png, shards, skipped, passed_over)


def _make_entry(
    key: str, image: FileInfo, depth_key: str | None = None, depth_map: FileInfo | None = None
) -> PackEntry:
    """Make the entry of an image and its depth map."""
    files = [image] if depth_map is None else [image, depth_map]
    num_bytes = sum(file.size for file in files)
    changed_ns = max(file.mtime_ns or 0 for file in files)
    return PackEntry(key, depth_key, num_bytes, changed_ns)


def _cut_into_shards(entries: list[PackEntry], shard_bytes: int) -> Iterator[tuple[PackEntry, ...]]:
    """Yield consecutive entries of at most `shard_bytes`.

    A larger image gets a shard of its own.
    """
    shard: list[PackEntry] = []
    num_bytes = 0
    for entry in entries:
        if shard and num_bytes + entry.num_bytes > shard_bytes:
            yield tuple(shard)
            shard, num_bytes = [], 0

        shard.append(entry)
        num_bytes += entry.num_bytes

    yield tuple(shard)


# --- Packing ---


@dataclass(frozen=True)
class PackResult:
    """What was packed, and what was not."""

    images: int
    shards: int
    num_bytes: int
    """Size of all shards."""
    skipped: dict[str, str]
    """URI → reason."""


def find_written_shards(plan: PackPlan) -> set[int]:
    """Return the shards that an earlier packing wrote completely.

    Such a shard has every file that the plan has for it.

    Raises `StorageError` where the output holds other files.
    """
    output = locate(plan.output)
    files = _list_files(output) if output.exists() else {}

    # Packing deletes old shards, so it must not share its folder.
    for file in files:
        if file != INDEX and not SHARD_FILE.fullmatch(file):
            raise StorageError(f"{plan.output} holds {file}, which is no part of a pack: choose an empty place")

    written = set()
    for shard in range(len(plan.shards)):
        if _is_written(plan.name_shard(shard), output, files):
            written.add(shard)

    return written


def _is_written(name: str, output: Location, files: Mapping[str, FileInfo]) -> bool:
    """Return whether a shard is complete.

    It and its part of the index are written and undamaged, and it skipped no image.
    """
    shard_file, part_file = _name_shard_file(name), _name_part_file(name)
    if shard_file not in files or part_file not in files:
        return False

    try:
        metadata = pq.read_schema(pa.BufferReader(output.child(part_file).read())).metadata or {}
    except pa.ArrowException:
        return False

    # Images that could not be read then may be readable now, so a shard that skipped some is written again.
    num_bytes = json.dumps({shard_file: files[shard_file].size})
    nothing = json.dumps({})
    return metadata.get(SHARDS) == num_bytes.encode() and metadata.get(SKIPPED_KEY) == nothing.encode()


def pack(plan: PackPlan, written: set[int], progress: Callable[[int, int], None]) -> PackResult:
    """Write the missing shards by tasks, then the index.

    `written` are the shards that are there already.

    `progress` is called with the number of images done and of all images. Files that cannot be read are skipped.

    Raises `StorageError`.
    """
    num_done = sum(len(plan.shards[shard]) for shard in written)
    progress(num_done, plan.num_images)

    missing = [shard for shard in range(len(plan.shards)) if shard not in written]
    if missing:
        # One task for each shard.
        DataContext.get_current().enable_progress_bars = False
        items = ray.data.from_items(missing, override_num_blocks=len(missing))

        # The stubs know no arguments of the function.
        rows = iterate_rows(items.map(_write_shard_of_row, fn_args=(ray.put(plan),)))  # type: ignore[arg-type]
        for row in rows:
            num_done += len(plan.shards[row["item"]])
            progress(num_done, plan.num_images)

    return write_index(plan)


def pack_here(plan: PackPlan) -> PackResult:
    """Write all shards and the index without Ray.

    Raises `StorageError`.
    """
    for shard in range(len(plan.shards)):
        write_shard(plan, shard)
    return write_index(plan)


def _write_shard_of_row(row: dict[str, int], plan: "ray.ObjectRef[PackPlan]") -> dict[str, int]:
    """Write the shard that a row of Ray Data names."""
    write_shard(ray.get(plan), row["item"])
    return row


# --- Shards ---


def write_shard(plan: PackPlan, shard: int) -> None:
    """Write one shard, then its part of the index.

    Raises `StorageError`.
    """
    output, name = locate(plan.output), plan.name_shard(shard)
    sources = plan.shards[shard]
    buffer = io.BytesIO()
    entries: list[dict] = []
    skipped: dict[str, str] = {}

    # Images are compressed already; and without compression, the bytes of a file are a range of the shard's bytes.
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with ThreadPoolExecutor(PARALLEL_READS) as readers, pq.ParquetWriter(buffer, SCHEMA, **options) as writer:
        rows = readers.map(partial(_read_row, plan), sources)
        for source, row in zip(sources, rows, strict=True):
            if isinstance(row, str):
                skipped[posixpath.join(plan.images, source.key)] = row
                continue

            # Each batch becomes a row group.
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
            entries.append(_make_index_entry(shard, row))

    # The offsets are known only now that the shard is complete.
    content = buffer.getvalue()
    _add_offsets(entries, content)

    # The part of the index comes last: it marks the shard as complete.
    output.child(_name_shard_file(name)).write(content)
    metadata = {
        SHARDS: json.dumps({_name_shard_file(name): len(content)}),
        SKIPPED_KEY: json.dumps(skipped),
    }
    _write_table(entries, metadata, output.child(_name_part_file(name)))


def _read_row(plan: PackPlan, source: PackEntry) -> dict[str, str | bytes] | str:
    """Read one image as a row of a shard.

    The row holds its depth map, too. Returns the reason where one of them cannot be read.
    """
    try:
        image = locate(plan.images).child(source.key).read()
        row: dict[str, str | bytes] = {"key": source.key, "image": image}
        if source.depth_key is not None:
            row |= _read_depth(plan, source.depth_key)

        return row
    except (BadImage, MissingFile) as error:
        return str(error)


def _read_depth(plan: PackPlan, key: str) -> dict[str, str | bytes]:
    """Read a depth map as columns of a row.

    PNG and .mat become .npy of the same values, which decodes faster; PNG stays where the plan keeps it.
    """
    assert plan.depth is not None
    content = locate(plan.depth).child(key).read()
    suffix = posixpath.splitext(key)[1].lower()
    if suffix == ".npy" or (suffix == ".png" and plan.keep_png):
        return {"depth_key": key, "depth": content}

    try:
        pixels = decode_depth(content, suffix)
    except BadImage as error:
        raise BadImage(f"its depth map {posixpath.join(plan.depth, key)}: {error}") from None

    return {"depth_key": f"{strip_suffix(key)}.npy", "depth": _encode_npy(pixels)}


def _encode_npy(pixels: np.ndarray) -> bytes:
    """Encode an array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels))
    return buffer.getvalue()


# --- The index ---


def _make_index_entry(shard: int, row: dict) -> dict:
    """Make a row of the index, without the offsets."""
    entry = {"shard": shard, "key": row["key"], "depth_key": row.get("depth_key")}
    for column in ("image", "depth"):
        if column in row:
            entry[f"{column}_bytes"] = len(row[column])
    return entry


def _add_offsets(entries: list[dict], content: bytes) -> None:
    """Add the offsets of the files in a shard's bytes.

    `content` are the bytes of the shard, and `entries` its rows of the index.

    Every column chunk holds a single value, which ends where the chunk ends. Before the value stands its length, which
    proves the offset. Source: Apache Parquet, encodings, PLAIN of a byte array.

    Raises `RuntimeError` where pyarrow writes another layout.
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
    """Write the index, then delete what earlier packings left.

    Raises `StorageError`.
    """
    output = locate(plan.output)
    names = [plan.name_shard(shard) for shard in range(len(plan.shards))]

    # Collect the rows and metadata of all parts.
    entries: list[dict] = []
    shards: dict[str, int] = {}
    skipped = dict(plan.skipped)
    for name in names:
        part = pq.read_table(pa.BufferReader(output.child(_name_part_file(name)).read()))
        entries += part.to_pylist()
        shards |= json.loads(part.schema.metadata[SHARDS])
        skipped |= json.loads(part.schema.metadata[SKIPPED_KEY])

    if not entries:
        raise StorageError(f"not one of the images below {plan.images} can be packed")

    # From here on, readers see the new pack.
    _write_table(entries, {SHARDS: json.dumps(shards)}, output.child(INDEX))

    # The shards of earlier packings are in no index any more.
    kept = {INDEX}
    for name in names:
        kept |= {_name_shard_file(name), _name_part_file(name)}

    for file in _list_files(output).keys() - kept:
        output.child(file).delete()

    return PackResult(len(entries), len(shards), sum(shards.values()), skipped)


def _list_files(output: Location) -> dict[str, FileInfo]:
    """List the files of a pack, without that by which its writer shows that it lives."""
    infos = output.list_infos()
    return {file: info for file, info in infos.items() if not file.startswith(f"{DRIVERS_FOLDER}/")}


def _name_shard_file(name: str) -> str:
    """Return the file name of a shard."""
    return f"{name}.parquet"


def _name_part_file(name: str) -> str:
    """Return the file name of a part of the index."""
    return f"{name}.index.parquet"


def _write_table(entries: list[dict], metadata: dict[bytes, str], place: Location) -> None:
    """Write the index, or a part of it."""
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(entries, schema=INDEX_SCHEMA.with_metadata(metadata))
    pq.write_table(table, buffer, compression="zstd")
    place.write(buffer.getvalue())
