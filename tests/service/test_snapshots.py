import numpy as np
import pandas
import pytest

from corun_ray.core.labels import Label, Scores
from corun_ray.service import snapshots
from corun_ray.service.storage import StorageError, locate


def label(key: str, dtype: str = "uint8", transmission: bool = True) -> Label:
    rng = np.random.default_rng(len(key))
    image = (rng.uniform(0, 1, (3, 8, 8)) * (255 if dtype == "uint8" else 1)).astype(dtype)
    blocks = rng.uniform(0, 1, (2, 1, 1)).astype(np.float32)
    return Label(key, Scores(0.25, 0.75), 7, image, image[:1] if transmission else None, blocks[0], blocks[1])


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_labels_come_back_bit_for_bit(tmp_path, dtype):
    labels = [label("a/b.png", dtype), label("ä.jpg", dtype, transmission=False)]
    place = locate(str(tmp_path)).child("pool/step.parquet")
    snapshots.write(place, labels)
    for before, after in zip(labels, snapshots.read(place), strict=True):
        assert (after.key, after.scores, after.step) == (before.key, before.scores, before.step)
        for name in snapshots.ARRAYS:
            old, new = getattr(before, name), getattr(after, name)
            assert (old is None and new is None) or (old.dtype == new.dtype and np.array_equal(old, new))


def test_pandas_reads_it(tmp_path):
    snapshots.write(locate(str(tmp_path)).child("pool.parquet"), [label(f"{i}.png") for i in range(100)])
    frame = pandas.read_parquet(tmp_path / "pool.parquet")
    assert frame["key"].tolist() == [f"{i}.png" for i in range(100)] and set(frame["quality"]) == {0.75}


def test_an_empty_pool_is_a_snapshot_too(tmp_path):
    place = locate(str(tmp_path)).child("pool.parquet")
    snapshots.write(place, [])
    assert list(snapshots.read(place)) == []


@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense", b"x" * 1000])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "pool.parquet").write_bytes(content)
    with pytest.raises(StorageError, match="not a label pool's snapshot"):
        list(snapshots.read(locate(str(tmp_path)).child("pool.parquet")))
