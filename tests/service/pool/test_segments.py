import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corun_ray.service.pool import segments
from corun_ray.service.pool.index import Head
from corun_ray.service.storage import StorageError, locate
from tests.service.labels import assert_equal, photo_label


@pytest.fixture
def folder(tmp_path):
    return locate(str(tmp_path)).child("segments")


@pytest.mark.parametrize("encoding", ["uint8", "float16", "float32"])
def test_labels_come_back_bit_for_bit(folder, encoding):
    labels = [photo_label("a/b.png", encoding), photo_label("ä.jpg", encoding, transmission=False)]
    segments.write(folder, "one", labels)
    for before, after in zip(labels, segments.read_labels(folder, "one"), strict=True):
        assert_equal(before, after)
    assert segments.read_index(folder, "one") == [Head(x.key, x.scores, x.step, x.size_bytes) for x in labels]


def test_single_rows_are_read(folder):
    labels = [photo_label(f"{i}.png") for i in range(11)]
    segments.write(folder, "one", labels)
    found = segments.read_labels(folder, "one", [0, 3, 4, 10])
    for row, after in zip([0, 3, 4, 10], found, strict=True):
        assert_equal(labels[row], after)


def test_pandas_reads_it(folder):
    segments.write(folder, "one", [photo_label(f"{i}.png") for i in range(9)])
    frame = pandas.read_parquet(f"{folder.path}/one.parquet")
    assert frame["key"].tolist() == [f"{i}.png" for i in range(9)] and set(frame["quality"]) == {0.75}
    row = frame.iloc[2]
    scene = np.frombuffer(row["scene"], row["dtype"]).reshape(3, row["height_px"], row["width_px"])
    assert np.array_equal(scene, photo_label("2.png").scene)


@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense", b"x" * 1000])
@pytest.mark.parametrize("name", ["one.parquet", "one.index.parquet"])
def test_other_files_are_refused(folder, content, name):
    segments.write(folder, "one", [photo_label("a")])
    folder.child(name).write(content)
    with pytest.raises(StorageError, match="cannot be read as labels"):
        segments.read_index(folder, "one")
        list(segments.read_labels(folder, "one"))


def test_a_truncated_file_is_refused(folder):
    segments.write(folder, "one", [photo_label(str(i)) for i in range(20)])
    place = segments.locate_images(folder, "one")
    place.write(place.read()[:-500])
    with pytest.raises(StorageError, match="cannot be read as labels"):
        list(segments.read_labels(folder, "one"))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("dtype", "object", "images of object, expected one of float16, float32, uint8"),
        ("height_px", 17, "scene of 1152 bytes, expected 1224"),
        ("height_px", 2**30, "sides of 1073741824 x 24 px"),
        ("width_px", -24, "sides of 16 x -24 px"),
        ("block_rows", 0, "2 blocks|0 x 3 blocks"),
        ("scene", b"short", "scene of 5 bytes, expected 1152"),
        ("transmission", b"short", "transmission of 5 bytes, expected 384"),
        ("block_quality", b"", "block_quality of 0 bytes, expected 24"),
        ("scene", None, "cannot be read as labels"),
    ],
)
def test_sizes_and_types_are_checked_before_use(folder, column, value, message):
    segments.write(folder, "one", [photo_label("a.png")])
    path = segments.locate_images(folder, "one").path
    rows = pq.read_table(path).to_pylist()
    rows[0][column] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=segments.SCHEMA), path)
    with pytest.raises(StorageError, match=message):
        list(segments.read_labels(folder, "one"))


def test_other_columns_are_refused(folder):
    segments.write(folder, "one", [photo_label("a.png")])
    pq.write_table(pa.table({"key": ["a"]}), segments.locate_images(folder, "one").path)
    pq.write_table(pa.table({"key": ["a"]}), segments.locate_index(folder, "one").path)
    with pytest.raises(StorageError, match="other columns than a segment's"):
        list(segments.read_labels(folder, "one"))
    with pytest.raises(StorageError, match="cannot be read as labels"):
        segments.read_index(folder, "one")
