import collections
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from corun_ray.core.data import augment
from corun_ray.core.data.device_samples import make_pairs, make_strong_views
from corun_ray.core.data.images import decode_image
from corun_ray.service.data import sample_maker
from corun_ray.service.data.manifest import Manifest, build_manifest
from corun_ray.service.data.sample_maker import (
    CLEAR,
    HAZY,
    SampleMaker,
    TooManyBadFiles,
    choose_image,
    decode_region,
)
from tests.conftest import write_image
from tests.naming import make_its, make_sots_indoor
from tests.service.jobs import small_job
from tests.unusable import draw_unusable_depth


def ignore(bad_files):
    raise AssertionError(f"unexpected bad files: {bad_files}")


def test_every_epoch_uses_each_image_once_in_another_order():
    epochs = [[choose_image(7, CLEAR, e * 10 + i, 10) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [choose_image(7, HAZY, i, 10) for i in range(10)]


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


def test_the_true_transmission_comes_with_a_sample_that_is_learnt_from_by_it(dataset, tmp_path):
    plain, job = (small_job("colabator", dataset, tmp_path, loss={"transmission": weight}) for weight in (0, 0.2))
    without, batch = (SampleMaker(one, build_manifest(one), 32, ignore)({"id": np.arange(3)}) for one in (plain, job))
    assert batch["transmission"].shape == (3, 32, 32) and batch["transmission"].dtype == np.uint8
    assert batch.keys() - without.keys() == {"transmission"}
    assert all(np.array_equal(without[name], batch[name]) for name in without), "the samples stay as they are"


@pytest.mark.parametrize("depth_kind", ["inverse", "metres"])
def test_a_sample_for_the_worker_has_the_draws_and_files_of_the_stream_s(depth_kind, dataset, tmp_path):
    data = {"depth_kind": depth_kind, "camera": "none", "random_resize": True}
    options: dict[str, Any] = {"data": data, "loss": {"transmission": 0.2}}
    job = small_job("colabator", dataset, tmp_path, **options)
    drawing = small_job("colabator", dataset, tmp_path, **(options | {"data": data | {"synthesis": "worker"}}))
    finished, drawn = (
        SampleMaker(one, build_manifest(one), 32, ignore)({"id": np.arange(6)}) for one in (job, drawing)
    )
    assert set(drawn) == {"drawn_pair", "strong_draw", "weak", "key", "index"}
    for name in ("weak", "key", "index"):
        assert np.array_equal(finished[name], drawn[name]), name

    # What the worker makes of it is what the stream would have made.
    made = make_pairs(drawn["drawn_pair"].tolist(), torch.device("cpu"), with_transmission=True)
    weak = torch.from_numpy(drawn["weak"]).permute(0, 3, 1, 2) / 255
    columns = [*made, make_strong_views(weak, drawn["strong_draw"].tolist())]
    for name, patches in zip(("hazy", "clear", "transmission", "strong"), columns, strict=True):
        assert patches is not None
        levels = (255 * patches).round().permute(0, 2, 3, 1).squeeze(-1).numpy()
        assert np.mean(np.abs(levels - finished[name]) > 1) < 0.002, name


def test_a_sample_for_the_worker_follows_from_seed_and_index_alone(dataset, tmp_path):
    job = small_job("colabator", dataset, tmp_path, data={"synthesis": "worker"})
    make = SampleMaker(job, build_manifest(job), 32, ignore)
    whole, part = make({"id": np.arange(4, 12)}), make({"id": np.array([7])})
    assert any(one.noise_seed is not None for one in whole["drawn_pair"])
    device = torch.device("cpu")
    together, alone = (make_pairs(batch["drawn_pair"].tolist(), device)[0] for batch in (whole, part))
    assert torch.equal(together[3:4], alone)
    assert whole["strong_draw"][3] == part["strong_draw"][0]


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
        image = manifest.clear[choose_image(job.seed, CLEAR, index, len(manifest.clear))]
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
    assert manifest.skipped == {str(clear / "nodepth.png"): "no depth map of this name"}


def test_jpegs_are_decoded_no_further_than_the_crop_goes_and_give_the_same_samples(dataset, tmp_path, monkeypatch):
    """Against samples of the same pixels in PNG, which are decoded whole; one file is damaged, and named."""
    rng = np.random.default_rng(3)
    for folder in ("jpeg", "png"):
        shutil.copytree(dataset / "depth", tmp_path / folder / "depth")
    for depth in sorted((dataset / "depth").iterdir()):
        height_px, width_px = np.load(depth).shape
        write_image(tmp_path / "jpeg" / "clear" / f"{depth.stem}.jpg", rng.integers(0, 256, (height_px, width_px, 3)))
        content = (tmp_path / "jpeg" / "clear" / f"{depth.stem}.jpg").read_bytes()
        write_image(tmp_path / "png" / "clear" / f"{depth.stem}.png", decode_image(content))
    damaged = tmp_path / "jpeg" / "clear" / f"{depth.stem}.jpg"
    tables = content.index(b"\xff\xc4")
    damaged.write_bytes(content[: tables + 5] + b"\xff" * 16 + content[tables + 21 :])
    (tmp_path / "png" / "clear" / f"{depth.stem}.png").write_bytes(b"damaged, too")

    rows: list[slice] = []
    monkeypatch.setattr(
        sample_maker, "decode_region", lambda data, *region: rows.append(region[0]) or decode_region(data, *region)
    )
    bad: dict[str, str] = {}
    makers = []
    for folder in ("jpeg", "png"):
        job = small_job("pretrain", tmp_path / folder, tmp_path)
        makers.append(SampleMaker(job, build_manifest(job), 32, bad.update))
    for index in range(10):
        ours, whole = (maker.sample(index) for maker in makers)
        assert np.array_equal(ours["hazy"], whole["hazy"]) and np.array_equal(ours["clear"], whole["clear"])
    assert len(rows) >= 10 and min(region.stop for region in rows) < height_px
    assert set(bad) == {str(damaged), str(tmp_path / "png" / "clear" / f"{depth.stem}.png")}


def test_with_nothing_usable_it_stops(tmp_path):
    (tmp_path / "clear").mkdir()
    (tmp_path / "clear/a.png").write_text("x")
    job = small_job("pretrain", tmp_path, tmp_path, data={"depth": None})
    bad: dict[str, str] = {}
    expected = f"not one of the 1 clear images can be used; the first: {tmp_path}/clear/a.png: not an image"
    with pytest.raises(TooManyBadFiles, match=expected):
        SampleMaker(job, Manifest(("a.png",), None, ()), 32, bad.update).sample(0)
    assert list(bad) == [str(tmp_path / "clear/a.png")]


def test_an_unusable_depth_map_is_blamed_on_itself(tmp_path):
    root = draw_unusable_depth(tmp_path, ("nan", "turned"))
    job = small_job("pretrain", root, tmp_path)
    with pytest.raises(TooManyBadFiles, match="2 clear images with their depth maps can be used; the first: .*/depth/"):
        SampleMaker(job, build_manifest(job), 32, lambda bad_files: None).sample(0)


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


@pytest.mark.parametrize("make_set", [make_its, make_sots_indoor])
def test_patches_of_a_named_set_show_the_same_place(make_set, dataset, tmp_path):
    """Several hazy images share a truth, and a truth loses its border before the patch is drawn."""
    named = make_set(tmp_path / "named")
    job = small_job("pretrain", dataset, tmp_path, data={"paired": named.keys, "random_resize": True})
    make = SampleMaker(job, build_manifest(job), 32, ignore)
    for index in range(len(named.pairs)):
        sample = make.sample(index)
        assert np.abs(0.5 * sample["clear"] + 110 - sample["hazy"]).max() <= 2


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
