"""Segments of a saved label pool: Parquet files of a few hundred labels, readable with pyarrow or pandas.

A segment `NAME.parquet` holds whole labels, a row each; `NAME.index.parquet` the same rows without images, so that a
pool's index is read without its images. Images are raw little-endian bytes, C order, in rows of their own `height_px`,
`width_px` and `dtype`. Nothing in them is ever executed, and sizes are checked before use.


Reads single labels back from segments: an actor beside its shard, so that a read costs no start of a process."""

import functools
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corun_ray.core.training.labels import Label, Scores
from corun_ray.service.pool import segments
from corun_ray.service.pool.index import Head
from corun_ray.service.storage import Location, StorageError, locate

ROWS_PER_GROUP = 4
"""Labels that have to be read to read one."""
DTYPES = frozenset({"uint8", "float16", "float32"})
MAX_SIDE_PX = 2**16

HEAD = [("key", pa.string()), ("clarity", pa.float64()), ("quality", pa.float64()), ("step", pa.int64())]
INDEX_SCHEMA = pa.schema([*HEAD, ("size_bytes", pa.int64())])
SCHEMA = pa.schema(
    [
        *HEAD,
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


def write(folder: Location, name: str, labels: Iterable[Label]) -> None:
    """Writes a segment; a reader sees each of its two files whole or not at all. Raises `StorageError`."""
    images, index = io.BytesIO(), io.BytesIO()
    heads = []
    # Photographs' noise does not compress: zstd would take off a tenth, and make a read three times as slow.
    with pq.ParquetWriter(images, SCHEMA, compression="none", use_dictionary=False, write_statistics=False) as writer:
        rows: list[dict] = []
        for label in labels:
            rows.append(_row(label))
            heads.append({**_head(label), "size_bytes": label.size_bytes})
            if len(rows) == ROWS_PER_GROUP:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    pq.write_table(pa.Table.from_pylist(heads, schema=INDEX_SCHEMA), index, compression="zstd")
    images_at(folder, name).write(images.getvalue())
    index_at(folder, name).write(index.getvalue())


def read_index(folder: Location, name: str) -> list[Head]:
    """The labels of a segment without their images, in the order of its rows; raises `StorageError`."""
    place = index_at(folder, name)
    with _reading(place):
        table = pq.read_table(pa.BufferReader(place.read()), schema=INDEX_SCHEMA)
        columns = [table[column].to_pylist() for column in INDEX_SCHEMA.names]
        if any(value is None for column in columns for value in column):
            raise ValueError("a value is missing")
        return [
            Head(key, Scores(clarity, quality), step, size)
            for key, clarity, quality, step, size in zip(*columns, strict=True)
        ]


def read_footer(folder: Location, name: str) -> pq.FileMetaData:
    """What `read_labels` must know of a segment before it reads a label; raises `StorageError`."""
    place = images_at(folder, name)
    with _reading(place), place.filesystem.open_input_file(place.path) as source:
        return pq.read_metadata(source)


def read_labels(
    folder: Location, name: str, rows: Sequence[int] | None = None, footer: pq.FileMetaData | None = None
) -> Iterator[Label]:
    """Labels of a segment, all or those of `rows` (ascending); raises `StorageError`."""
    place = images_at(folder, name)
    with _reading(place), place.filesystem.open_input_file(place.path) as source:
        file = pq.ParquetFile(source, metadata=footer, pre_buffer=True)
        if not file.schema_arrow.equals(SCHEMA):
            raise ValueError("other columns than a segment's")
        wanted = range(file.metadata.num_rows) if rows is None else rows
        for group, some in itertools.groupby(wanted, lambda row: row // ROWS_PER_GROUP):
            table = file.read_row_group(group, use_threads=False)
            for row in some:
                yield _label(table.slice(row % ROWS_PER_GROUP, 1).to_pylist()[0])


def images_at(folder: Location, name: str) -> Location:
    """Where a segment's labels are."""
    return folder.child(f"{name}.parquet")


def index_at(folder: Location, name: str) -> Location:
    """Where its index is."""
    return folder.child(f"{name}.index.parquet")


@contextmanager
def _reading(place: Location) -> Iterator[None]:
    """Turns what pyarrow and a wrong content raise into one line."""
    try:
        yield
    except (OSError, pa.ArrowException, IndexError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(f"{place.uri} cannot be read as labels: {reason}") from None


def _head(label: Label) -> dict:
    return {"key": label.key, **label.scores._asdict(), "step": label.step}


def _row(label: Label) -> dict:
    _, height_px, width_px = label.scene.shape
    block_rows, block_columns = label.block_clarity.shape
    return {
        **_head(label),
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


def _label(row: dict) -> Label:
    dtype, height_px, width_px = row["dtype"], row["height_px"], row["width_px"]
    if dtype not in DTYPES:
        raise ValueError(f"{row['key']}: images of {dtype}, expected one of {', '.join(sorted(DTYPES))}")
    blocks = (row["block_rows"], row["block_columns"])
    if not all(0 < side <= MAX_SIDE_PX for side in (height_px, width_px, *blocks)):
        raise ValueError(f"{row['key']}: sides of {height_px} x {width_px} px, {blocks[0]} x {blocks[1]} blocks")
    transmission = row["transmission"]
    return Label(
        key=row["key"],
        scores=Scores(row["clarity"], row["quality"]),
        step=row["step"],
        scene=_array(row, "scene", dtype, (3, height_px, width_px)),
        transmission=None if transmission is None else _array(row, "transmission", dtype, (1, height_px, width_px)),
        block_clarity=_array(row, "block_clarity", "float32", blocks),
        block_quality=_array(row, "block_quality", "float32", blocks),
    )


def _array(row: dict, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if len(row[name]) != expected:
        raise ValueError(f"{row['key']}: {name} of {len(row[name])} bytes, expected {expected}")
    return np.frombuffer(row[name], dtype).reshape(shape)


READS_AT_ONCE = 8
"""Of one reader; enough to have several requests to an object store under way."""
FOOTERS = 256
"""Segments whose footers are remembered: of 131,072 labels, and 360 MB at most."""


class SegmentReader:
    """Labels of the segments in one folder. No file stays open, so that a deleted segment takes no room on a disk."""

    def __init__(self, folder_uri: str) -> None:
        self._folder = locate(folder_uri)
        self._footer = functools.lru_cache(FOOTERS)(functools.partial(segments.read_footer, self._folder))

    def read(self, segment: str, row: int) -> Label:
        """One label; raises `StorageError`."""
        footer: pq.FileMetaData = self._footer(segment)
        (label,) = segments.read_labels(self._folder, segment, [row], footer)
        return label
