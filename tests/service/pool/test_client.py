"""The pool's shards and their clients, for real: actors, the object store, segments on disk, processes killed."""

import os
import signal
import time

import numpy as np
import psutil
import pytest
import ray

from corun_ray.core.training.labels import Label, LocalPool, Scores
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import PoolClient, PoolError
from corun_ray.service.pool.keeper import PoolKeeper, collect_counters, order_nodes, start_pool
from corun_ray.service.pool.review import Review
from corun_ray.service.pool.shard import assign_shard, make_head
from corun_ray.service.storage import locate
from tests.service.labels import assert_equal, label, photo_label

DEADLINE_S = 60.0


class Pool:
    """A pool of its own with a keeper and a client."""

    def __init__(self, folder, shards=2, memory_mib=None, snapshot=None):
        self.folder = locate(str(folder)).child("pool")
        self.shards = start_pool(shards, self.folder, memory_mib)
        self.keeper = PoolKeeper(self.shards, self.folder)
        self.generation = self.keeper.restore(snapshot)
        self.client = PoolClient(self.shards, self.generation)

    def restart(self, step):
        """Another start of the workers, from the snapshot of a step."""
        self.generation = self.keeper.restore(snapshots.format_name(step))
        self.client = PoolClient(self.shards, self.generation)

    def offer(self, *labels):
        self.client.offer(labels)
        self.client.settle()

    def read(self, *keys):
        return self.client.prefetch(keys).result()

    def steps(self, *keys):
        return [found and found.step for found in self.read(*keys)]

    def save(self, step):
        self.client.settle()
        self.keeper.finish(step, self.keeper.freeze())

    def content(self, step):
        found = snapshots.read(self.folder.child(snapshots.format_name(step)))
        return {one.key: one for one in snapshots.read_labels(self.folder, found)}

    def processes(self):
        """The shards' processes, by the ids that Ray knows them by."""
        pids = ray.get([shard.__ray_call__.remote(lambda self: os.getpid()) for shard in self.shards])
        return [psutil.Process(pid) for pid in pids]

    def kill(self, number):
        process = self.processes()[number]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("shards", [1, 3])
def test_one_worker_decides_as_the_method_says(local_ray, tmp_path, shards):
    """A thousand random offers against the plain rule in memory; every tenth read is compared."""
    rng = np.random.default_rng(3)
    pool, oracle = Pool(tmp_path, shards), LocalPool()
    for step in range(1000):
        # Few distinct scores: ties are common, and must go to the newcomer.
        offer = label(f"{rng.integers(20)}.png", *(rng.integers(0, 6, 2) / 5).tolist(), step)
        pool.client.offer([offer])
        oracle.offer([offer])
        if step % 10 == 0:
            keys = [f"{i}.png" for i in rng.choice(20, 3, replace=False)]
            for mine, theirs in zip(pool.read(*keys), oracle.prefetch(keys).result(), strict=True):
                assert (mine is None) == (theirs is None)
                if mine and theirs:
                    assert_equal(mine, theirs)


def test_keys_have_the_same_shard_everywhere_and_spread_evenly():
    assert [assign_shard(key, 4) for key in ("a.png", "b/c.jpg", "ä.png")] == [2, 3, 0]
    filled = np.bincount([assign_shard(f"{i:05d}.jpg", 4) for i in range(10_000)])
    assert filled.min() > 2300


@ray.remote(num_cpus=0)
class Rank:
    def __init__(self, shards, generation):
        self.client = PoolClient(shards, generation)

    def offer(self, *labels):
        self.client.offer(labels)
        self.client.settle()

    def read(self, key):
        (found,) = self.client.prefetch([key]).result()
        return None if found is None else (found.scores, found.step, int(found.scene[0, 0, 0]))

    def race(self, seed, rounds):
        """Offers, for each round's key, labels of random equal scores; returns the best it offered, by key."""
        rng = np.random.default_rng(seed)
        best = {}
        for first in range(0, rounds, 100):
            offers = [label(f"{i % 10}", *(2 * [float(s)]), i) for i, s in enumerate(rng.random(100), first)]
            for one in offers:
                best[one.key] = max(best.get(one.key, 0.0), one.scores.clarity)
                self.client.offer([one])
            self.client.settle()
        return best


def test_shards_go_to_the_nodes_that_are_meant_for_them_the_drivers_last():
    nodes = [{"NodeID": name, "Alive": name != "dead", "Labels": {}} for name in ("b", "a", "here", "dead")]
    assert order_nodes(nodes, "here") == ["a", "b", "here"]
    meant = [{"NodeID": name, "Alive": name != "q", "Labels": {"corun-role": "pool"}} for name in ("r", "q", "p")]
    assert order_nodes(nodes + meant, "here") == ["p", "r"]
    assert order_nodes(nodes + meant[:1], "r") == ["r"]


def test_a_label_offered_by_one_worker_process_is_served_to_another_and_outlives_it(local_ray, tmp_path):
    pool = Pool(tmp_path)
    first, second = (Rank.remote(pool.shards, pool.generation) for _ in range(2))
    assert ray.get(second.read.remote("a.png")) is None
    ray.get(first.offer.remote(label("a.png", 0.5, 0.5, step=9)))
    assert ray.get(second.read.remote("a.png")) == ((0.5, 0.5), 9, 9)
    ray.kill(first)
    assert ray.get(second.read.remote("a.png")) == ((0.5, 0.5), 9, 9)
    ray.get(second.offer.remote(label("a.png", 0.4, 0.9, step=10)))
    assert ray.get(second.read.remote("a.png"))[1] == 9


def test_of_two_writers_that_race_the_better_label_remains(local_ray, tmp_path):
    """Two thousand offers of each of two processes for the same ten keys."""
    pool = Pool(tmp_path)
    ranks = [Rank.remote(pool.shards, pool.generation) for _ in range(2)]
    bests = ray.get([rank.race.remote(seed, 2_000) for seed, rank in enumerate(ranks)])
    for key in bests[0]:
        assert pool.read(key)[0].scores.clarity == max(best[key] for best in bests)
    assert collect_counters(pool.shards)["offers"] == 4_000


def test_counters_count(local_ray, tmp_path):
    pool = Pool(tmp_path)
    pool.offer(label("a"), label("b"))
    pool.offer(label("a", 0.4, 0.9), label("a", 0.6, 0.6))
    pool.read("a", "b", "c")
    counted = collect_counters(pool.shards)
    names = ("labels", "offers", "wins", "reads", "hits", "loads", "evictions")
    assert [counted[name] for name in names] == [2, 4, 3, 3, 2, 0, 0]
    assert counted["memory_mib"] == pytest.approx(2 * label("a").size_bytes / 2**20)
    assert counted["shard_0/labels"] + counted["shard_1/labels"] == 2


def test_a_restored_pool_stands_where_it_stood_and_late_offers_do_not_change_it(local_ray, tmp_path):
    pool = Pool(tmp_path)
    pool.offer(label("a", step=1), label("b", 0.3, 0.3, 2))
    pool.save(3)
    pool.offer(label("a", 0.9, 0.9, 5), label("c", 0.1, 0.1, 6))
    late = pool.client
    generation = pool.keeper.restore(snapshots.format_name(3))
    late.offer([label("a", 1.0, 1.0, 7)])
    late.settle()
    again = PoolClient(pool.shards, generation)
    assert [found and found.step for found in again.prefetch(["a", "b", "c"]).result()] == [1, 2, None]
    again.offer([label("a", 0.9, 0.9, 8)])
    assert again.prefetch(["a"]).result()[0].step == 8
    assert collect_counters(pool.shards)["offers"] == 3, "the counters resume from the snapshot"


def test_rejected_labels_leave_a_restored_pool_for_good(local_ray, tmp_path):
    pool, bad = Pool(tmp_path), [label(key, step=1) for key in ("a", "b", "c")]
    pool.offer(*bad, label("fine", step=2))
    pool.save(3)
    review = Review(pool.folder)
    for one in bad:
        review.decide(make_head(one), "reject")
    review.decide(make_head(bad[2]), "undecided")

    # A start of the workers applies the review, and so does a shard that dies before the next snapshot.
    pool.restart(3)
    assert pool.keeper.num_rejected == 2 and pool.steps("a", "b", "c", "fine") == [None, None, 1, 2]
    pool.kill(assign_shard("a", 2))
    pool.offer(label("a", step=5), label("b", 0.9, 0.4, 5))
    wait_until(lambda: pool.steps("a", "b", "c", "fine") == [None, None, 1, 2])

    # Another start from the old snapshot leads to the same. Only a better label comes in.
    pool.restart(3)
    pool.offer(label("a", 0.6, 0.5, 5), label("b", 0.9, 0.4, 5))
    assert pool.keeper.num_rejected == 2 and pool.steps("a", "b", "c", "fine") == [5, None, 1, 2]
    pool.save(6)
    assert {key: one.step for key, one in pool.content(6).items()} == {"a": 5, "c": 1, "fine": 2}

    # The new snapshot remembers the rejections itself, for another number of shards, too.
    review.decide(make_head(bad[1]), "undecided")
    pool = Pool(tmp_path, shards=1, snapshot=snapshots.format_name(6))
    pool.offer(label("b", step=7))
    assert pool.keeper.num_rejected == 0 and pool.steps("a", "b", "c", "fine") == [5, None, 1, 2]


def test_a_stale_keeper_can_neither_save_nor_sweep(local_ray, tmp_path):
    pool = Pool(tmp_path)
    stale = pool.keeper
    parts = stale.freeze()
    PoolKeeper(pool.shards, pool.folder).restore(None)
    with pytest.raises(PoolError, match="another start of the workers has taken over"):
        stale.finish(1, parts)
    for action in (stale.freeze, lambda: stale.sweep([])):
        with pytest.raises(RuntimeError, match="generation .* is over"):
            action()


def test_labels_lie_in_the_object_store_and_are_read_in_place(local_ray, tmp_path):
    pool = Pool(tmp_path, 1)
    big = np.zeros((3, 400, 400), np.uint8)
    blocks = np.zeros((1, 1), np.float32)
    pool.offer(Label("big", Scores(0.5, 0.5), 0, big, None, blocks, blocks))
    (ref,) = ray.get(pool.shards[0].read.remote(["big"])).labels
    assert isinstance(ref, ray.ObjectRef)
    (found,) = pool.read("big")
    assert not found.scene.flags.writeable, "read in place, not copied"


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_snapshot_is_restored_whole_by_any_number_of_shards(local_ray, tmp_path, shards):
    """Saved in two steps by two shards; read back with images only when asked for."""
    pool = Pool(tmp_path)
    labels = [photo_label(f"{i}.png", transmission=i % 2 == 0, step=1) for i in range(12)]
    pool.offer(*labels[:8])
    pool.save(2)
    pool.offer(*labels[8:])
    pool.save(4)
    assert pool.content(4).keys() == {one.key for one in labels} and len(pool.content(2)) == 8
    again = Pool(tmp_path, shards, snapshot=snapshots.format_name(4))
    assert collect_counters(again.shards)["labels"] == 12 and collect_counters(again.shards)["memory_mib"] == 0
    for before, after in zip(labels, again.read(*(one.key for one in labels)), strict=True):
        assert_equal(before, after)
    assert collect_counters(again.shards)["loads"] == 12
    again.save(6)
    assert again.content(6).keys() == pool.content(4).keys()


def test_beyond_its_budget_labels_come_from_storage(local_ray, tmp_path):
    pool = Pool(tmp_path, 1, memory_mib=1)
    picture = np.random.default_rng(0).integers(0, 256, (3, 200, 300), dtype=np.uint8)
    blocks = np.zeros((1, 1), np.float32)
    labels = [Label(f"{i}", Scores(0.5, 0.5), i, picture + np.uint8(i), None, blocks, blocks) for i in range(20)]
    for one in labels:
        pool.offer(one)
    wait_until(lambda: pool.offer(labels[-1]) or collect_counters(pool.shards)["memory_mib"] <= 1)
    for before, after in zip(labels, pool.read(*(one.key for one in labels)), strict=True):
        assert_equal(before, after)
    assert collect_counters(pool.shards)["loads"] > 0 and collect_counters(pool.shards)["memory_mib"] <= 1


def test_a_shard_that_is_killed_comes_back_with_everything(local_ray, tmp_path):
    """What the snapshot has from there, what a worker offered since from the worker; meanwhile reads do not fail."""
    pool = Pool(tmp_path)
    keys = [f"{i}.png" for i in range(10)]
    pool.offer(*(label(key, step=1) for key in keys))
    pool.save(2)
    pool.offer(*(label(key, 0.9, 0.9, step=3) for key in keys[:4]))
    expected = pool.steps(*keys)
    assert expected == [3] * 4 + [1] * 6
    pool.kill(0)
    gone = {key for key in keys if assign_shard(key, 2) == 0}
    assert {key for key, step in zip(keys, pool.steps(*keys), strict=True) if step is None} <= gone
    wait_until(lambda: pool.steps(*keys) == expected)
    assert collect_counters(pool.shards)["labels"] == 10


def test_a_label_offered_while_its_shard_is_away_arrives(local_ray, tmp_path):
    pool = Pool(tmp_path, 1)
    pool.offer(label("old", step=1))
    pool.save(2)
    pool.kill(0)
    pool.client.offer([label("new", step=3), label("old", 0.1, 0.1, step=3)])
    wait_until(lambda: pool.steps("old", "new") == [1, 3])


def test_a_shard_that_dies_while_it_is_saved_is_saved_when_it_is_back(local_ray, tmp_path):
    pool = Pool(tmp_path)
    keys = [f"{i}.png" for i in range(10)]
    pool.offer(*(label(key, step=1) for key in keys))
    pool.save(2)
    pool.offer(label("late", step=3))
    parts = pool.keeper.freeze()
    number = assign_shard("late", 2)
    pool.kill(number)
    pool.client.settle()  # which notices, and hands over what only this worker holds
    pool.keeper.finish(4, parts)
    assert pool.content(4).keys() == {*keys, "late"}


def test_a_sweep_keeps_what_the_pool_needs(local_ray, tmp_path):
    pool = Pool(tmp_path)
    for step in range(1, 5):
        pool.offer(*(label(f"{i}.png", 0.1 * step, 0.1 * step, step - 1) for i in range(6)))
        pool.save(step)
    pool.keeper.sweep([3, 4])
    assert {snapshots.parse_step(file) for file in pool.folder.list_files()} - {None} == {3, 4}
    assert all(len(pool.content(step)) == 6 for step in (3, 4))
    segment_files = [file for file in pool.folder.list_files() if file.startswith("segments/")]
    assert len(segment_files) == 2 * 2 * 2, "images and index of two snapshots of two shards"
