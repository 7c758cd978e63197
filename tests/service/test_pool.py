import numpy as np
import ray

from corun_ray.core.labels import Label, LocalPool, Scores
from corun_ray.service.pool import PoolClient, start_pool


def label(key: str, clarity: float, quality: float, step: int = 0) -> Label:
    fill = np.full((3, 8, 8), step % 256, np.uint8)
    blocks = np.full((1, 1), 0.5, np.float32)
    return Label(key, Scores(clarity, quality), step, fill, fill[:1], blocks, blocks)


def fresh_pool(generation: int = 1):
    actor = start_pool()
    ray.get(actor.restore.remote(None, generation))
    return actor, PoolClient(actor, generation)


def test_one_worker_decides_as_the_method_says(local_ray):
    """A thousand random offers against the plain rule in memory; every tenth read is compared."""
    rng = np.random.default_rng(3)
    _, client = fresh_pool()
    oracle = LocalPool()
    for step in range(1000):
        # Few distinct scores: ties are common, and must go to the newcomer.
        offer = label(f"{rng.integers(20)}.png", *(rng.integers(0, 6, 2) / 5).tolist(), step)
        client.offer([offer])
        oracle.offer([offer])
        if step % 10 == 0:
            keys = [f"{i}.png" for i in rng.choice(20, 3, replace=False)]
            for mine, theirs in zip(client.prefetch(keys).result(), oracle.prefetch(keys).result(), strict=True):
                assert (mine is None) == (theirs is None)
                if mine and theirs:
                    assert (mine.scores, mine.step) == (theirs.scores, theirs.step)
                    assert np.array_equal(mine.scene, theirs.scene)


@ray.remote(num_cpus=0)
class Rank:
    def __init__(self, actor):
        self.client = PoolClient(actor, 1)

    def offer(self, *labels):
        self.client.offer(labels)
        self.client.flush()

    def read(self, key):
        (found,) = self.client.prefetch([key]).result()
        return None if found is None else (found.scores, found.step, int(found.scene[0, 0, 0]))


def test_a_label_offered_by_one_worker_process_is_served_to_another_and_outlives_it(local_ray):
    actor, _ = fresh_pool()
    first, second = Rank.remote(actor), Rank.remote(actor)
    assert ray.get(second.read.remote("a.png")) is None
    ray.get(first.offer.remote(label("a.png", 0.5, 0.5, step=9)))
    assert ray.get(second.read.remote("a.png")) == ((0.5, 0.5), 9, 9)
    ray.kill(first)
    assert ray.get(second.read.remote("a.png")) == ((0.5, 0.5), 9, 9)
    ray.get(second.offer.remote(label("a.png", 0.4, 0.9, step=10)))
    assert ray.get(second.read.remote("a.png"))[1] == 9


def test_counters_count(local_ray):
    actor, client = fresh_pool()
    client.offer([label("a", 0.5, 0.5), label("b", 0.5, 0.5)])
    client.offer([label("a", 0.4, 0.9), label("a", 0.6, 0.6)])
    client.prefetch(["a", "b", "c"]).result()
    counted = ray.get(actor.counters.remote())
    assert counted == {"labels": 2, "offers": 4, "wins": 3, "reads": 3, "hits": 2}


def test_a_restored_pool_stands_where_it_stood_and_late_offers_do_not_change_it(local_ray, tmp_path):
    actor, client = fresh_pool()
    uri = str(tmp_path / "pool/step.parquet")
    client.offer([label("a", 0.5, 0.5, 1), label("b", 0.3, 0.3, 2)])
    client.flush()
    assert ray.get(actor.save.remote(uri)) == 2
    client.offer([label("a", 0.9, 0.9, 5), label("c", 0.1, 0.1, 6)])
    client.flush()

    assert ray.get(actor.restore.remote(uri, 2)) == 2
    client.offer([label("a", 1.0, 1.0, 7)])
    client.flush()
    again = PoolClient(actor, 2)
    found = again.prefetch(["a", "b", "c"]).result()
    assert [entry and entry.step for entry in found] == [1, 2, None]
    again.offer([label("a", 0.9, 0.9, 8)])
    assert again.prefetch(["a"]).result()[0].step == 8


def test_labels_lie_in_the_object_store(local_ray):
    actor, client = fresh_pool()
    big = np.zeros((3, 400, 400), np.uint8)
    blocks = np.zeros((1, 1), np.float32)
    client.offer([Label("big", Scores(0.5, 0.5), 0, big, None, blocks, blocks)])
    (ref,) = ray.get(actor.read.remote(["big"]))
    assert isinstance(ref, ray.ObjectRef)
    (found,) = client.prefetch(["big"]).result()
    assert not found.scene.flags.writeable, "read in place, not copied"
