import json
from collections import Counter

import pytest

from corun_ray.core.training.labels import Scores
from corun_ray.service.pool import segments, snapshots
from corun_ray.service.pool.index import PoolCounters, Segment
from corun_ray.service.storage import StorageError, locate
from tests.service.labels import label


@pytest.fixture
def pool(tmp_path):
    return locate(str(tmp_path)).child("pool")


def write_segment(pool, name, order, *labels):
    segments.write(pool.child("segments"), name, labels)
    return Segment(name, order, len(labels))


def test_the_later_segment_is_right(pool):
    old = write_segment(pool, "a", 1, label("x", step=1), label("y", step=1))
    new = write_segment(pool, "b", 2, label("y", 0.9, step=5))
    other = write_segment(pool, "c", 1, label("z", step=2))
    snapshots.write(pool, 6, 3, [[old, new], [old, other]], [PoolCounters(), PoolCounters()])
    content = snapshots.read(pool.child("step_00000006.json"))
    assert [segment.name for segment in content.segments] == ["a", "c", "b"]
    assert {key: head.step for key, (head, _) in snapshots.read_index(pool, content).items()} == {
        "x": 1,
        "y": 5,
        "z": 2,
    }
    assert {one.key: one.step for one in snapshots.read_labels(pool, content)} == {"x": 1, "y": 5, "z": 2}
    names = [[one.name for one in snapshots.select_segments(content, n, 2)] for n in range(2)]
    assert names == [["a", "b"], ["a", "c"]]
    assert [one.name for one in snapshots.select_segments(content, 0, 3)] == ["a", "c", "b"]


def test_labels_without_a_finite_score_are_dropped_and_counted(pool):
    nan, inf = float("nan"), float("inf")
    segment = write_segment(pool, "a", 1, label("x", nan), label("y"), label("z", 0.5, -inf))
    snapshots.write(pool, 6, 3, [[segment]], [PoolCounters()])
    index = snapshots.read_index(pool, snapshots.read(pool.child("step_00000006.json")))
    assert snapshots.drop_unrated(index) == 2 and list(index) == ["y"]


def test_rejected_labels_are_not_read_though_segments_hold_them(pool):
    """Neither the rejected label nor an older one of its image counts, a better one does."""
    old = write_segment(pool, "a", 1, label("x", 0.4, 0.4), label("y", 0.4, 0.4), label("z"))
    new = write_segment(pool, "b", 2, label("y", 0.7, 0.7, step=4))
    rejections = {"x": Scores(0.5, 0.5), "y": Scores(0.5, 0.5), "never": Scores(0.1, 0.1)}
    snapshots.write(pool, 6, 2, [[old, new]], [PoolCounters()], rejections)
    content = snapshots.read(pool.child("step_00000006.json"))
    assert snapshots.parse_rejections(content.rejected) == rejections
    assert {key: head.step for key, (head, _) in snapshots.read_index(pool, content).items()} == {"y": 4, "z": 0}
    assert {one.key for one in snapshots.read_labels(pool, content)} == {"y", "z"}


def test_without_rejected_labels_a_snapshot_is_as_in_earlier_versions(pool):
    snapshots.write(pool, 0, 0, [[]], [PoolCounters()])
    assert b"rejected" not in pool.child(snapshots.format_name(0)).read()


def test_an_empty_pool_is_a_snapshot_too(pool):
    snapshots.write(pool, 0, 0, [[]], [PoolCounters()])
    assert snapshots.read_index(pool, snapshots.read(pool.child(snapshots.format_name(0)))) == {}


def test_counters_come_back_by_shard_or_all_on_the_first(pool):
    counters = [PoolCounters(offers=n, wins=n, wins_by_step=Counter({n: 1})) for n in (1, 2)]
    snapshots.write(pool, 1, 0, [[], []], counters)
    content = snapshots.read(pool.child(snapshots.format_name(1)))
    assert [snapshots.select_counters(content, n, 2).offers for n in range(2)] == [1, 2]
    assert [snapshots.select_counters(content, n, 3).offers for n in range(3)] == [3, 0, 0]
    assert snapshots.sum_counters(content).wins_by_step == {1: 1, 2: 1}


def damaged(**changes):
    record = {"format": 2, "step": 1, "labels": 0, "segments": [], "shards": []}
    return json.dumps(record | changes).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        damaged(format=1),
        damaged(step=-1),
        damaged(more=1),
        damaged(segments=[{"name": "../../etc/passwd", "order": 1, "rows": 1}]),
        damaged(segments=[{"name": "a/b", "order": 1, "rows": 1}]),
        damaged(segments=[{"name": "a", "order": "1", "rows": 1}]),
        damaged(shards=[{"offers": 1}]),
        damaged()[:-5],
    ],
)
def test_other_content_is_refused(pool, content):
    pool.child("step_00000001.json").write(content)
    with pytest.raises(StorageError, match="is no snapshot of a label pool") as error:
        snapshots.read(pool.child("step_00000001.json"))
    assert "\n" not in str(error.value)


def test_a_sweep_leaves_what_is_named_or_in_use(pool):
    for name in ("old", "shared", "new", "unfinished"):
        write_segment(pool, name, 1, label(name))
    snapshots.write(pool, 1, 2, [[Segment("old", 1, 1), Segment("shared", 1, 1)]], [PoolCounters()])
    snapshots.write(pool, 2, 2, [[Segment("shared", 1, 1), Segment("new", 2, 1)]], [PoolCounters()])
    snapshots.write_current(pool, snapshots.Current(generation=1, snapshot="step_00000002.json"))
    snapshots.sweep(pool, {"step_00000002.json"}, iter(["unfinished"]))
    left = {file.rpartition("/")[2].partition(".")[0] for file in pool.list_files()}
    assert left == {"shared", "new", "unfinished", "step_00000002", "current"}


def test_what_is_in_use_is_asked_after_the_listing(pool):
    """A segment that begins to be written in between is not in the listing, so it cannot be deleted."""
    write_segment(pool, "stale", 1, label("a"))

    def in_use():
        write_segment(pool, "begun", 1, label("b"))
        yield from ()

    snapshots.sweep(pool, set(), in_use())
    assert sorted(pool.list_files()) == ["segments/begun.index.parquet", "segments/begun.parquet"]


def test_where_the_pool_stands(pool):
    for snapshot in (None, "step_00000020.json"):
        current = snapshots.Current(generation=7, snapshot=snapshot)
        snapshots.write_current(pool, current)
        assert snapshots.read_current(pool) == current
    pool.child("current.json").write(b'{"generation": 1, "snapshot": "../x.json"}')
    with pytest.raises(StorageError, match="is no label pool's state: snapshot"):
        snapshots.read_current(pool)
