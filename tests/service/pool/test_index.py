"""One shard's index without a process: the rule, what is saved where, what stays in memory."""

import numpy as np
import pytest

from corun_ray.core.training.labels import Scores, supersedes
from corun_ray.service.pool.index import (
    MAX_SMALL_SEGMENTS,
    Head,
    PoolIndex,
    Segment,
    SegmentRow,
    is_rejected,
    merge_rejections,
)

SIZE = 100


def head(key: str, score: float = 0.5, step: int = 0, quality: float | None = None) -> Head:
    return Head(key, Scores(score, score if quality is None else quality), step, SIZE)


def offer(index: PoolIndex, *heads: Head) -> list[bool]:
    return [index.offer(one, lambda one=one: ("payload", one)) for one in heads]


def save(index: PoolIndex, storage: dict) -> list[str]:
    """Writes what a freeze asks for into a dict of segments; returns the names that make the snapshot."""
    frozen = index.freeze()
    for part in frozen.new:
        rows = [storage[row.segment][row.row] if isinstance(row, SegmentRow) else row[1] for row in part.rows]
        storage[part.segment.name] = rows
    index.mark_saved(frozen.save_id)
    return [segment.name for segment in (*frozen.kept, *(part.segment for part in frozen.new))]


def content(names: list[str], storage: dict) -> dict[str, Head]:
    """What a snapshot's segments hold by the rule: of two that have a key, the later one is right."""
    return {one.key: one for name in sorted(names) for one in storage[name]}


def test_a_thousand_random_offers_saves_and_evictions_lose_nothing():
    """Against the plain rule in memory; every snapshot holds exactly what the pool held."""
    rng = np.random.default_rng(5)
    index, storage, oracle = PoolIndex(budget_bytes=10 * SIZE), {}, {}
    for step in range(1000):
        one = head(f"{rng.integers(40)}", rng.integers(6) / 5, step, rng.integers(6) / 5)
        stored = oracle.get(one.key)
        wins = supersedes(one.scores, stored.scores if stored else None)
        oracle |= {one.key: one} if wins else {}
        assert offer(index, one) == [wins]
        if step % 37 == 0:
            assert content(save(index, storage), storage) == oracle
        index.evict()
        (entry,) = index.read([one.key])
        assert entry.head == oracle[one.key]
        if entry.payload != ("payload", entry.head):
            segment, row = entry.segment_row
            assert storage[segment][row] == entry.head
    assert len(index) == len(oracle) == 40
    counted = index.get_counters()
    assert counted.evictions > 50 and counted.offers == 1000 and counted.wins == sum(counted.wins_by_step.values())


def test_memory_stays_within_the_budget_as_soon_as_labels_are_saved():
    index, storage = PoolIndex(budget_bytes=3 * SIZE), {}
    offer(index, *(head(str(i)) for i in range(5)))
    assert index.evict() and index.counters.resident_bytes == 5 * SIZE, "nothing is dropped that only memory has"
    save(index, storage)
    index.read(["0"])
    assert not index.evict() and index.counters.resident_bytes == 3 * SIZE
    kept = {str(i) for i in range(5) if index.read([str(i)])[0].payload is not None}
    assert kept == {"0", "3", "4"}, "those that were asked for last"


def test_only_changes_are_written():
    index, storage = PoolIndex(), {}
    offer(index, *(head(str(i)) for i in range(100)))
    (first,) = save(index, storage)
    assert save(index, storage) == [first], "nothing changed: nothing is written"
    offer(index, head("7", 0.9, 3))
    names = save(index, storage)
    assert [len(storage[name]) for name in names] == [100, 1]
    assert content(names, storage)["7"].step == 3


def test_segments_are_bounded(monkeypatch):
    monkeypatch.setattr("corun_ray.service.pool.index.ROWS_PER_SEGMENT", 10)
    index, storage = PoolIndex(), {}
    offer(index, *(head(str(i)) for i in range(25)))
    assert [len(storage[name]) for name in save(index, storage)] == [10, 10, 5]


def test_mostly_superseded_segments_are_rewritten_and_forgotten():
    index, storage = PoolIndex(), {}
    offer(index, *(head(str(i)) for i in range(10)))
    (first,) = save(index, storage)
    offer(index, *(head(str(i), 0.9, 1) for i in range(5)))
    assert first in save(index, storage), "half of it is in use"
    offer(index, head("5", 0.9, 2))
    names = save(index, storage)
    assert first not in names, "with 4 of 10 labels in use, they move out"
    assert content(names, storage) == {entry.head.key: entry.head for entry in index.read([str(i) for i in range(10)])}
    assert len(index) == 10 and first not in index.get_segment_names()


def test_many_small_segments_become_one():
    index, storage = PoolIndex(), {}
    for i in range(MAX_SMALL_SEGMENTS + 1):
        offer(index, head(str(i)))
        names = save(index, storage)
    assert len(names) == MAX_SMALL_SEGMENTS + 1
    assert len(save(index, storage)) == 1


def test_a_label_replaced_while_it_is_saved_is_not_taken_for_saved():
    index = PoolIndex(budget_bytes=0)
    offer(index, head("a", 0.5, 1))
    frozen = index.freeze()
    offer(index, head("a", 0.6, 2))
    index.mark_saved(frozen.save_id)
    assert index.evict(), "the new label is in memory alone"
    (entry,) = index.read(["a"])
    assert entry.segment_row is None and entry.payload == ("payload", head("a", 0.6, 2))


def test_the_same_label_again_is_no_second_win():
    index = PoolIndex()
    one = head("a", 0.5, 1)
    assert offer(index, one, one) == [True, True]
    assert (index.counters.offers, index.counters.wins) == (1, 1)


def test_a_restored_index_keeps_payloads_that_still_fit():
    index, storage = PoolIndex(), {}
    offer(index, head("same", 0.5, 1), head("better", 0.5, 1))
    frozen = index.freeze()
    index.mark_saved(frozen.save_id)
    rows = [(one.head, one.segment_row) for one in index.read(["same", "better"])]
    offer(index, head("better", 0.9, 2), head("new", 0.1, 3))
    index.restore([part.segment for part in frozen.new], rows)
    same, better, new = index.read(["same", "better", "new"])
    assert same.payload is not None and better.payload is None and new is None
    assert better.head.step == 1 and index.counters.resident_bytes == SIZE
    storage[frozen.new[0].segment.name] = [one for one, _ in rows]
    assert content(save(index, storage), storage).keys() == {"same", "better"}


def test_a_lost_payload_is_read_back_or_the_label_is_gone():
    index, storage = PoolIndex(), {}
    offer(index, head("saved"))
    save(index, storage)
    offer(index, head("unsaved"))
    index.forget("saved", "saved@another time")
    assert index.read(["saved"])[0].payload is not None
    for key in ("saved", "unsaved"):
        index.forget(key, index.read([key])[0].payload)
    saved, unsaved = index.read(["saved", "unsaved"])
    assert saved.payload is None and saved.segment_row is not None and unsaved is None
    assert index.counters.resident_bytes == 0


@pytest.mark.parametrize("number", [1, 2, 3])
def test_counters_add_up(number):
    index = PoolIndex()
    offer(index, head("a", step=number))
    total = index.get_counters() + index.get_counters()
    assert (total.labels, total.offers, total.wins_by_step) == (2, 2, {number: 2})


def test_a_rejected_label_leaves_and_only_a_better_one_takes_its_place():
    index, storage = PoolIndex(), {}
    offer(index, head("bad", 0.5, 1), head("good", 0.5, 1), head("replaced", 0.5, 1))
    names = save(index, storage)
    rows = [(one, SegmentRow(names[0], row)) for row, one in enumerate(storage[names[0]])]

    rejections = {"bad": Scores(0.5, 0.5), "replaced": Scores(0.4, 0.5), "never had": Scores(0.2, 0.2)}
    segments = [Segment(names[0], 1, len(rows))]
    assert index.restore(segments, rows, rejections=rejections) == 1
    assert [found is not None for found in index.read(["bad", "good", "replaced"])] == [False, True, True]

    # The same again, one that is better in one score and worse in the other, and one that is better.
    assert offer(index, head("bad", 0.5, 1), head("bad", 0.9, 2, quality=0.4)) == [False, False]
    assert offer(index, head("never had", 0.1, 2), head("bad", 0.5, 3, quality=0.6)) == [False, True]
    assert index.read(["bad"])[0].head.step == 3 and index.get_counters().labels == 3
    assert offer(index, head("bad", 0.5, 4)) == [False], "no worse than the rejected one, and still refused"


def test_of_two_rejected_labels_of_an_image_both_must_be_surpassed():
    merged = merge_rejections({"a": Scores(0.8, 0.2), "b": Scores(0.1, 0.1)}, {"a": Scores(0.3, 0.6)})
    assert merged == {"a": Scores(0.8, 0.6), "b": Scores(0.1, 0.1)}
    assert is_rejected(head("a", 0.8, quality=0.5), merged) and not is_rejected(head("a", 0.9, quality=0.6), merged)
    assert not is_rejected(head("c", 0.0), merged)
