"""Segments of a saved label pool: Parquet files of a few hundred labels, readable with pyarrow or pandas.

A segment `NAME.parquet` holds whole labels, one a row. `NAME.index.parquet` holds the same rows without images, so
that a pool's index is read without its images. Images are raw little-endian bytes in C order; `height_px`, `width_px`
and `dtype` of the row tell their shape. Nothing in a file is ever executed, and sizes are checked before use.
"""

import functools
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corun_ray.core.training.labels import Label, Scores
from corun_ray.service.errors import format_reason
from corun_ray.service.pool.index import Head
from corun_ray.service.storage import DamagedFile, Location, StorageError, locate

ROWS_PER_GROUP = 4
"""Labels of a Parquet row group: to read one label, all of its group are read."""
DTYPES = frozenset({"uint8", "float16", "float32"})
MAX_SIDE_PX = 2**16
CONCURRENT_READS = 8
"""Labels that one reader reads at a time: enough to have several requests to an object store under way."""
CACHED_FOOTERS = 256
"""Segments whose footers a reader remembers: of 131,072 labels, and 360 MB at most."""

HEAD_COLUMNS = [("key", pa.string()), ("clarity", pa.float64()), ("quality", pa.float64()), ("step", pa.int64())]
INDEX_SCHEMA = pa.schema([*HEAD_COLUMNS, ("size_bytes", pa.int64())])
SCHEMA = pa.schema(
    [
        *HEAD_COLUMNS,
        ("dtype", pa.string()),
        ("height_px", pa.int32()),
        ("width_px", pa.int32()),
        ("scene", pa.binary()),
        ("transmission", pa.binary()),
        ("block_rows", pa.int32()),
        ("block_columns", pa.int32()),
        ("block_clarity", pa.binary()),
        ("block_quality", pa.binary()),
    ]
)


def locate_images(folder: Location, name: str) -> Location:
    """Return the place of a segment's labels."""
    return folder.child(f"{name}.parquet")


def locate_index(folder: Location, name: str) -> Location:
    """Return the place of a segment's index."""
    return folder.child(f"{name}.index.parquet")


def write(folder: Location, name: str, labels: Iterable[Label]) -> None:
    """Write a segment: its labels, then its index.

    A reader sees each of the two files whole or not at all.

    Raises `StorageError`.
    """
    images, index = io.BytesIO(), io.BytesIO()
    heads = []

    # Write row groups of a few labels each, without compression: the noise of photographs does not compress. zstd
    # would save a tenth of the size, and make reading three times as slow.
    with pq.ParquetWriter(images, SCHEMA, compression="none", use_dictionary=False, write_statistics=False) as writer:
        rows: list[dict] = []
        for label in labels:
            rows.append(_make_row(label))
            heads.append({**_make_head_columns(label), "size_bytes": label.size_bytes})
            if len(rows) == ROWS_PER_GROUP:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))

    # The index holds no images, so it does compress.
    pq.write_table(pa.Table.from_pylist(heads, schema=INDEX_SCHEMA), index, compression="zstd")

    locate_images(folder, name).write(images.getvalue())
    locate_index(folder, name).write(index.getvalue())


def read_index(folder: Location, name: str) -> list[Head]:
    """Read the labels of a segment without their images.

    They are in the order of the rows.

    Raises `StorageError`.
    """
    place = locate_index(folder, name)
    with _translate_errors(place):
        # pq.read_table would import pyarrow's datasets, and pandas with them.
        table = pq.ParquetFile(pa.BufferReader(place.read())).read().select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
        columns = [table[column].to_pylist() for column in INDEX_SCHEMA.names]

        # Parquet columns may hold nulls, which no label has.
        for column in columns:
            if None in column:
                raise ValueError("a value is missing")

        heads = []
        for key, clarity, quality, step, size_bytes in zip(*columns, strict=True):
            heads.append(Head(key, Scores(clarity, quality), step, size_bytes))
        return heads


def read_footer(folder: Location, name: str) -> pq.FileMetaData:
    """Read the footer of a segment.

    `read_labels` needs it before it reads a label.

    Raises `StorageError`.
    """
    place = locate_images(folder, name)
    with _translate_errors(place), place.filesystem.open_input_file(place.path) as source:
        return pq.read_metadata(source)


def read_labels(
    folder: Location, name: str, rows: Sequence[int] | None = None, footer: pq.FileMetaData | None = None
) -> Iterator[Label]:
    """Read the labels of a segment.

    `rows` (ascending) selects some of them. A known `footer` saves a request.

    Raises `StorageError`.
    """
    place = locate_images(folder, name)
    with _translate_errors(place), place.filesystem.open_input_file(place.path) as source:
        # Refuse files of any other kind before a column is read.
        file = pq.ParquetFile(source, metadata=footer, pre_buffer=True)
        if not file.schema_arrow.equals(SCHEMA):
            raise ValueError("other columns than a segment's")

        # Read each row group once, however many of its labels are wanted.
        wanted = range(file.metadata.num_rows) if rows is None else rows
        for group, rows_of_group in itertools.groupby(wanted, lambda row: row // ROWS_PER_GROUP):
            table = file.read_row_group(group, use_threads=False)
            for row in rows_of_group:
                yield _parse_label(table.slice(row % ROWS_PER_GROUP, 1).to_pylist()[0])


class SegmentReader:
    """Reads single labels of the segments in one folder; an actor beside its shard, so no process starts for a read.

    No file stays open, so that a deleted segment takes no room on a disk.
    """

    def __init__(self, folder_uri: str) -> None:
        self._folder = locate(folder_uri)
        self._read_footer = functools.lru_cache(CACHED_FOOTERS)(functools.partial(read_footer, self._folder))

    def read(self, segment: str, row: int) -> Label:
        """Read one label.

        Raises `StorageError`.
        """
        footer: pq.FileMetaData = self._read_footer(segment)
        (label,) = read_labels(self._folder, segment, [row], footer)
        return label


@contextmanager
def _translate_errors(place: Location) -> Iterator[None]:
    """Raise reading errors as one line.

    They are the errors of pyarrow and of wrong content; the line names the file.
    """
    try:
        yield
    except (OSError, pa.ArrowException, IndexError, KeyError, TypeError, ValueError) as error:
        kind = StorageError if isinstance(error, OSError) else DamagedFile
        raise kind(f"{place.uri} cannot be read as labels: {format_reason(error)}") from None


def _make_head_columns(label: Label) -> dict:
    return {"key": label.key, **label.scores._asdict(), "step": label.step}


def _make_row(label: Label) -> dict:
    """Return a label as a row of `SCHEMA`."""
    _, height_px, width_px = label.scene.shape
    block_rows, block_columns = label.block_clarity.shape
    return {
        **_make_head_columns(label),
        "dtype": label.scene.dtype.name,
        "height_px": height_px,
        "width_px": width_px,
        "scene": label.scene.tobytes(),
        "transmission": None if label.transmission is None else label.transmission.tobytes(),
        "block_rows": block_rows,
        "block_columns": block_columns,
        "block_clarity": label.block_clarity.astype(np.float32).tobytes(),
        "block_quality": label.block_quality.astype(np.float32).tobytes(),
    }


def _parse_label(row: dict) -> Label:
    """Return the label of a row.

    Raises `ValueError` where types, sides and lengths do not fit together.
    """
    # Check the type and the sides before an array is made of them.
    dtype, height_px, width_px = row["dtype"], row["height_px"], row["width_px"]
    if dtype not in DTYPES:
        raise ValueError(f"{row['key']}: images of {dtype}, expected one of {', '.join(sorted(DTYPES))}")
    blocks = (row["block_rows"], row["block_columns"])
    if not all(0 < side <= MAX_SIDE_PX for side in (height_px, width_px, *blocks)):
        raise ValueError(f"{row['key']}: sides of {height_px} x {width_px} px, {blocks[0]} x {blocks[1]} blocks")

    # A network without transmission leaves its column null.
    scene = _parse_array(row, "scene", dtype, (3, height_px, width_px))
    transmission = None
    if row["transmission"] is not None:
        transmission = _parse_array(row, "transmission", dtype, (1, height_px, width_px))

    return Label(
        key=row["key"],
        scores=Scores(row["clarity"], row["quality"]),
        step=row["step"],
        scene=scene,
        transmission=transmission,
        block_clarity=_parse_array(row, "block_clarity", "float32", blocks),
        block_quality=_parse_array(row, "block_quality", "float32", blocks),
    )


def _parse_array(row: dict, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array in the column `name`, read in place.

    Raises `ValueError` where its length is not that of `shape`.
    """
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(row[name]) != expected:
        raise ValueError(f"{row['key']}: {name} of {len(row[name])} bytes, expected {expected}")
    return np.frombuffer(row[name], dtype).reshape(shape)
