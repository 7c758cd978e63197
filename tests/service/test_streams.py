import collections

import numpy as np
import pytest
import ray

from corun_ray.service.board import start_board
from corun_ray.service.manifest import Manifest, build_manifest
from corun_ray.service.streams import (
    CLEAR,
    HAZY,
    Layout,
    SampleMaker,
    TooManyBadFiles,
    batches,
    image_of_sample,
    split_stream,
)
from tests.conftest import write_image
from tests.service.jobs import small_job


def ignore(bad_files):
    raise AssertionError(f"unexpected bad files: {bad_files}")


def test_every_epoch_uses_each_image_once_in_another_order():
    epochs = [[image_of_sample(7, CLEAR, e * 10 + i, 10) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [image_of_sample(7, HAZY, i, 10) for i in range(10)]


def test_a_sample_follows_from_seed_and_index_alone(dataset, tmp_path):
    job = small_job("colabator", dataset, tmp_path)
    make = SampleMaker(job, build_manifest(job), ignore)
    whole = make({"id": np.arange(5, 9)})
    assert whole["hazy"].shape == whole["strong"].shape == (4, 32, 32, 3)
    assert whole["hazy"].dtype == np.uint8 and whole["index"].tolist() == [5, 6, 7, 8]
    part = make({"id": np.array([7])})
    for name in ("hazy", "clear", "weak", "strong", "key"):
        assert np.array_equal(whole[name][2:3], part[name]), name
    assert not np.array_equal(whole["hazy"], whole["clear"])


def test_without_depth_maps_it_makes_its_own(dataset, tmp_path):
    job = small_job("pretrain", dataset, tmp_path, data={"depth": None})
    sample = SampleMaker(job, build_manifest(job), ignore).sample(0)
    assert set(sample) == {"hazy", "clear"}
    assert np.abs(sample["hazy"].astype(int) - sample["clear"]).mean() > 2


def test_awkward_files_are_used_correctly_or_named(tmp_path):
    """The mix of the issue: truncated JPEG, text as .png, missing depth, grey, RGBA, 16 bit."""
    rng = np.random.default_rng(1)
    clear, depth = tmp_path / "clear", tmp_path / "depth"
    depth.mkdir(parents=True)
    good = np.full((48, 48, 3), (200, 100, 50), np.uint8)
    write_image(clear / "good.png", good)
    write_image(clear / "grey.png", np.full((48, 48), 90, np.uint8))
    write_image(clear / "alpha.png", np.dstack([good, np.full((48, 48), 128, np.uint8)]))
    write_image(clear / "deep.png", good.astype(np.uint16) * 257)
    write_image(clear / "broken.jpg", rng.integers(0, 255, (48, 48, 3)).astype(np.uint8))
    jpeg = (clear / "broken.jpg").read_bytes()
    (clear / "broken.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (clear / "text.png").write_text("not a picture")
    write_image(clear / "nodepth.png", good)
    for name in ("good", "grey", "alpha", "deep", "broken", "text"):
        np.save(depth / f"{name}.npy", np.linspace(0, 1, 48 * 48, dtype=np.float32).reshape(48, 48))

    job = small_job("pretrain", tmp_path, tmp_path)
    manifest = build_manifest(job)
    bad: dict[str, str] = {}
    maker = SampleMaker(job, manifest, bad.update)
    colours = collections.defaultdict(set)
    for index in range(len(manifest.clear)):
        image = manifest.clear[image_of_sample(job.seed, CLEAR, index, len(manifest.clear))]
        sample = maker.sample(index)
        if image not in ("broken.jpg", "text.png"):
            colours[image].add(tuple(np.median(sample["clear"], axis=(0, 1)).astype(int).tolist()))
    assert colours == {
        "good.png": {(200, 100, 50)},
        "alpha.png": {(200, 100, 50)},
        "deep.png": {(200, 100, 50)},
        "grey.png": {(90, 90, 90)},
    }
    assert {uri.rsplit("/", 1)[1] for uri in bad} == {"broken.jpg", "text.png"}
    assert "truncated" in bad[str(clear / "broken.jpg")] and "not an image" in bad[str(clear / "text.png")]
    assert manifest.set_aside == {str(clear / "nodepth.png"): "no depth map of this name"}


def test_with_nothing_usable_it_stops(tmp_path):
    (tmp_path / "clear").mkdir()
    (tmp_path / "clear/a.png").write_text("x")
    job = small_job("pretrain", tmp_path, tmp_path, data={"depth": None})
    bad: dict[str, str] = {}
    with pytest.raises(TooManyBadFiles, match="not one of the 1 clear images"):
        SampleMaker(job, Manifest(("a.png",), None, ()), bad.update).sample(0)
    assert list(bad) == [str(tmp_path / "clear/a.png")]


@ray.remote(num_cpus=0)
def drain(shard, layout, rank):
    return [(batch["index"].tolist(), batch["key"].tolist()) for batch in batches(shard, layout, rank)]


def read_stream(job, first, workers):
    """What each rank is given: step → rank → (indices, keys)."""
    board = start_board()
    manifest = ray.put(build_manifest(job))
    size = job.train.batch_per_worker
    layout = Layout(first, job.train.steps - first // (size * workers), size, workers)
    shards = split_stream(job, manifest, board, layout)
    per_rank = ray.get([drain.remote(shard, layout, rank) for rank, shard in enumerate(shards)])
    return list(zip(*per_rank, strict=True))


def test_steps_take_the_stream_in_order_at_any_number_of_workers(local_ray, dataset, tmp_path):
    """One global batch is the same four samples, whether one worker takes it or two; a restart goes on in it."""
    one = small_job("colabator", dataset, tmp_path, train={"batch_per_worker": 4, "steps": 20})
    two = small_job("colabator", dataset, tmp_path, train={"batch_per_worker": 2, "steps": 20}, cluster={"workers": 2})
    alone = read_stream(one, 0, 1)
    together = read_stream(two, 0, 2)
    resumed = read_stream(two, 8, 2)

    def per_step(steps):
        return [[sum((list(rank[part]) for rank in step), []) for part in (0, 1)] for step in steps]

    assert [indices for indices, _ in per_step(alone)] == [list(range(4 * s, 4 * s + 4)) for s in range(20)]
    assert per_step(together) == per_step(alone)
    assert per_step(resumed) == per_step(alone)[2:]


@pytest.mark.parametrize("num_steps, batch, workers", [(1, 1, 1), (16, 2, 3), (17, 1, 2), (100, 3, 4), (90_000, 1, 5)])
def test_the_layout_gives_each_rank_its_batches_in_order(num_steps, batch, workers):
    """Whatever the cut, the r-th rank's blocks, read in turn, are the r-th batch of each step."""
    layout = Layout(1000, num_steps, batch, workers)
    assert layout.num_blocks <= 20_000 and layout.blocks_per_worker * layout.steps_per_block >= num_steps
    rows = np.arange(layout.num_blocks * layout.rows_per_block).reshape(-1, workers, layout.rows_per_block)
    samples = layout.samples(rows)
    for rank in range(workers):
        mine = samples[:, rank].reshape(-1, batch)[:num_steps]
        steps = np.arange(num_steps)[:, None]
        assert np.array_equal(mine, 1000 + (steps * workers + rank) * batch + np.arange(batch))


def test_a_stream_out_of_order_is_an_error():
    class Shard:
        def iter_batches(self, **options):
            yield {"index": np.array([0])}
            yield {"index": np.array([2])}

    taken = batches(Shard(), Layout(0, 2, 1, 1), 0)
    next(taken)
    with pytest.raises(RuntimeError, match=r"given samples \[2\], expected 1"):
        next(taken)
