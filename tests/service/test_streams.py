import collections
import os
import shutil
import time

import numpy as np
import psutil
import pytest
import ray

from corun_ray.core import augment
from corun_ray.core.images import decode_image
from corun_ray.service.board import start_board
from corun_ray.service.manifest import Manifest, build_manifest
from corun_ray.service.phases import Layout, remaining_phases
from corun_ray.service.streams import (
    CLEAR,
    HAZY,
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
    make = SampleMaker(job, build_manifest(job), 32, ignore)
    whole = make({"id": np.arange(5, 9)})
    assert whole["hazy"].shape == whole["strong"].shape == (4, 32, 32, 3)
    assert whole["hazy"].dtype == np.uint8 and whole["index"].tolist() == [5, 6, 7, 8]
    part = make({"id": np.array([7])})
    for name in ("hazy", "clear", "weak", "strong", "key"):
        assert np.array_equal(whole[name][2:3], part[name]), name
    assert not np.array_equal(whole["hazy"], whole["clear"])


def test_without_depth_maps_it_makes_its_own(dataset, tmp_path):
    job = small_job("pretrain", dataset, tmp_path, data={"depth": None})
    sample = SampleMaker(job, build_manifest(job), 32, ignore).sample(0)
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
    maker = SampleMaker(job, manifest, 32, bad.update)
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
        SampleMaker(job, Manifest(("a.png",), None, ()), 32, bad.update).sample(0)
    assert list(bad) == [str(tmp_path / "clear/a.png")]


def paired(root):
    return {"paired": {"hazy": str(root / "hazy"), "clear": str(root / "hazy_truth")}}


def test_paired_images_make_the_samples(dataset, tmp_path):
    job = small_job("pretrain", dataset, tmp_path, data={**paired(dataset), "rotation": True})
    make = SampleMaker(job, build_manifest(job), 32, ignore)
    for index in range(12):
        sample = make.sample(index)
        assert set(sample) == {"hazy", "clear"} and sample["hazy"].shape == (32, 32, 3)
        assert np.abs(0.5 * sample["clear"] + 110 - sample["hazy"]).max() <= 1
    assert not np.array_equal(make.sample(0)["clear"], make.sample(6)["clear"])


def test_with_pairs_colabator_takes_real_images_as_they_are(dataset, tmp_path):
    """With paired data nothing goes through JPEG, so neither does the real half of the sample."""
    job = small_job("colabator", dataset, tmp_path, data=paired(dataset))
    make = SampleMaker(job, build_manifest(job), 32, ignore)
    for index in range(8):
        sample = make.sample(index)
        assert np.abs(0.5 * sample["clear"] + 110 - sample["hazy"]).max() <= 2
        real = decode_image((dataset / "hazy" / sample["key"]).read_bytes())
        np.testing.assert_array_equal(sample["weak"], augment.resize(real, 32, 32))


def test_a_pair_of_two_sizes_is_named_and_the_next_one_used(dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    write_image(data / "hazy/photo_2.png", np.zeros((50, 60, 3), np.uint8))
    job = small_job("pretrain", data, tmp_path, data=paired(data))
    bad: dict[str, str] = {}
    make = SampleMaker(job, build_manifest(job), 32, bad.update)
    assert len({make.sample(index)["clear"].tobytes() for index in range(6)}) == 6
    reason = "degraded image of 60 x 50 px does not fit its clean one of 80 x 68 px"
    assert bad == {str(data / "hazy/photo_2.png"): reason}


def test_rotation_leaves_the_haze_of_a_sample_alone(dataset, tmp_path):
    """Only with rotation on is one number more drawn; and then patches do get turned."""
    plain, turned = (
        small_job("pretrain", dataset, tmp_path, data={"rotation": rotation}) for rotation in (False, True)
    )
    turns = set()
    for index in range(16):
        before, after = (SampleMaker(job, build_manifest(job), 32, ignore).sample(index) for job in (plain, turned))
        turns.add(next(n for n in range(4) if np.array_equal(np.rot90(before["clear"], n), after["clear"])))
    assert turns == {0, 1, 2, 3}


@ray.remote(num_cpus=0)
def drain(shard, layout, rank):
    return [(batch["index"].tolist(), batch["hazy"].shape, batch.get("key")) for batch in batches(shard, layout, rank)]


def read_stream(job, step, first, workers):
    """What each rank is given: step → rank → (indices, shape, keys)."""
    board = start_board()
    manifest = ray.put(build_manifest(job))
    steps = []
    for phase, layout in remaining_phases(job, step, first, workers):
        shards = split_stream(job, manifest, board, layout, phase.patch_px)
        per_rank = ray.get([drain.remote(shard, layout, rank) for rank, shard in enumerate(shards)])
        steps += zip(*per_rank, strict=True)
    return steps


def test_steps_take_the_stream_in_order_at_any_number_of_workers(local_ray, dataset, tmp_path):
    """One global batch is the same four samples, whether one worker takes it or two; a restart goes on in it."""
    one = small_job("colabator", dataset, tmp_path, train={"batch_per_worker": 4, "steps": 20})
    two = small_job("colabator", dataset, tmp_path, train={"batch_per_worker": 2, "steps": 20}, cluster={"workers": 2})
    alone = read_stream(one, 0, 0, 1)
    together = read_stream(two, 0, 0, 2)
    resumed = read_stream(two, 2, 8, 2)

    def per_step(steps):
        return [[sum((list(rank[part]) for rank in step), []) for part in (0, 2)] for step in steps]

    assert [indices for indices, _ in per_step(alone)] == [list(range(4 * s, 4 * s + 4)) for s in range(20)]
    assert per_step(together) == per_step(alone)
    assert per_step(resumed) == per_step(alone)[2:]


def test_phases_follow_each_other_without_a_gap_also_after_a_restart_within_one(local_ray, dataset, tmp_path):
    sections = {
        "train": {
            "batch_per_worker": 1,
            "steps": 7,
            "progressive": [
                {"from_step": 2, "patch_px": 48, "batch_per_worker": 2},
                {"from_step": 5, "patch_px": 64, "batch_per_worker": 1},
            ],
        },
        "cluster": {"workers": 2},
    }
    job = small_job("pretrain", dataset, tmp_path, **sections)
    whole = read_stream(job, 0, 0, 2)
    indices = [[index for rank in step for index in rank[0]] for step in whole]
    assert sum(indices, []) == list(range(2 * 2 + 3 * 4 + 2 * 2))
    assert [len(step) for step in indices] == [2, 2, 4, 4, 4, 2, 2]
    shapes = [(1, 32)] * 2 + [(2, 48)] * 3 + [(1, 64)] * 2
    assert [step[0][1] for step in whole] == [(batch, side, side, 3) for batch, side in shapes]
    assert read_stream(job, 3, 8, 2) == whole[3:]


def test_a_stream_out_of_order_is_an_error():
    class Shard:
        def iter_batches(self, **options):
            yield {"index": np.array([0])}
            yield {"index": np.array([2])}

    taken = batches(Shard(), Layout(0, 2, 1, 1), 0)
    next(taken)
    with pytest.raises(RuntimeError, match=r"given samples \[2\], expected 1"):
        next(taken)


def is_decoding():
    return any("ReadRange" in process.name() for process in psutil.process_iter())


def test_a_stream_that_is_ahead_leaves_the_processor_alone(local_ray, dataset, tmp_path):
    """Ray Data's scheduler would look for work without a pause, once it has made as much as it may."""
    job = small_job(
        "pretrain", dataset, tmp_path, train={"batch_per_worker": 8, "steps": 20_000}, data={"patch_px": 512}
    )
    ((phase, layout),) = remaining_phases(job, 0, 0, 1)
    (shard,) = split_stream(job, ray.put(build_manifest(job)), start_board(), layout, phase.patch_px)
    stream = batches(shard, layout, 0)
    next(stream)
    quiet_looks, deadline_s = 0, time.monotonic() + 120
    while quiet_looks < 6 and time.monotonic() < deadline_s:
        time.sleep(0.5)
        quiet_looks = 0 if is_decoding() else quiet_looks + 1
    assert quiet_looks == 6, "it gets no further than it may"
    coordinator = psutil.Process(ray.get(shard._coord_actor.__ray_call__.remote(lambda actor: os.getpid())))
    before_s, since_s = coordinator.cpu_times().user, time.monotonic()
    time.sleep(3)
    assert coordinator.cpu_times().user - before_s < 0.4 * (time.monotonic() - since_s)
    assert next(stream)["index"].tolist() == [*range(8, 16)], "and goes on"
