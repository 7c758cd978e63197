"""A label pool on storage: one Parquet file, one row a label, readable with pyarrow or pandas.

Arrays are raw little-endian bytes beside their dtype and shape; nothing in the file is ever executed.
"""

import io
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corun_ray.core.labels import Label, Scores
from corun_ray.service.storage import Location, StorageError

ROWS_PER_GROUP = 64
DTYPES = frozenset({"uint8", "float16", "float32"})
ARRAYS = ("scene", "transmission", "block_clarity", "block_quality")

ARRAY_TYPE = pa.struct([("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("data", pa.binary())])
SCHEMA = pa.schema(
    [("key", pa.string()), ("clarity", pa.float64()), ("quality", pa.float64()), ("step", pa.int64())]
    + [(name, ARRAY_TYPE) for name in ARRAYS]
)


def write(target: Location, labels: Iterable[Label]) -> None:
    """Writes a snapshot; a reader sees all of it or nothing. Raises `StorageError`."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd") as writer:
        rows: list[dict] = []
        for label in labels:
            rows.append(_row(label))
            if len(rows) == ROWS_PER_GROUP:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    target.write(buffer.getvalue())


def read(source: Location) -> Iterator[Label]:
    """The labels of a snapshot; raises `StorageError` for a file that is none."""
    try:
        file = pq.ParquetFile(io.BytesIO(source.read()))
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
            for row in batch.to_pylist():
                yield _label(row)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise StorageError(f"{source.uri} is not a label pool's snapshot: {str(error).splitlines()[0]}") from None


def _row(label: Label) -> dict:
    arrays = {name: _pack(getattr(label, name)) for name in ARRAYS}
    return {"key": label.key, **label.scores._asdict(), "step": label.step, **arrays}


def _label(row: dict) -> Label:
    scores = Scores(row["clarity"], row["quality"])
    arrays = {name: _unpack(row[name]) for name in ARRAYS}
    if any(arrays[name] is None for name in ARRAYS if name != "transmission"):
        raise ValueError(f"label {row['key']} lacks an array")
    return Label(key=row["key"], scores=scores, step=row["step"], **arrays)  # type: ignore[arg-type]


def _pack(array: np.ndarray | None) -> dict | None:
    if array is None:
        return None
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": array.tobytes()}


def _unpack(packed: dict | None) -> np.ndarray | None:
    if packed is None:
        return None
    if packed["dtype"] not in DTYPES:
        raise ValueError(f"an array of {packed['dtype']}; expected one of {', '.join(sorted(DTYPES))}")
    return np.frombuffer(packed["data"], dtype=packed["dtype"]).reshape(packed["shape"])
