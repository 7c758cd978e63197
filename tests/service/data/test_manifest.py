import shutil

import pytest

from corun_ray.config.pairing import TruthSection
from corun_ray.service.data.manifest import (
    ManifestError,
    build_manifest,
    list_validation_sets,
    pair_validation_images,
    refuse_other_sizes,
)
from tests.naming import MAKERS, make_its, make_nh_haze, make_sots_indoor
from tests.service.data.test_packs import packed
from tests.service.jobs import small_job


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "data")


def test_pairs_by_stem_and_names_every_unmatched_file(copy, tmp_path):
    (copy / "depth/view_3.npy").unlink()
    (copy / "depth/stray.npy").write_bytes(b"x")
    (copy / "depth/view_5.png").write_bytes(b"x")
    (copy / "clear/.DS_Store").write_bytes(b"x")
    (copy / "clear/notes.txt").write_text("x")
    manifest = build_manifest(small_job("colabator", copy, tmp_path))
    assert manifest.clear == tuple(f"view_{i}.png" for i in (0, 1, 2, 4, 6, 7))
    assert manifest.depth == tuple(f"view_{i}.npy" for i in (0, 1, 2, 4, 6, 7))
    assert manifest.hazy == tuple(f"photo_{i}.png" for i in range(6))
    reasons = {uri.rsplit("/", 1)[1]: reason for uri, reason in manifest.skipped.items()}
    assert reasons == {
        "view_3.png": "no depth map of this name",
        "view_5.png": "2 depth maps match it: view_5.npy, view_5.png",
        "stray.npy": "depth map that matches no image",
    }


def test_images_in_folders_of_the_same_name_stay_apart(copy, tmp_path):
    for kind, suffix in (("clear", "png"), ("depth", "npy")):
        (copy / kind / "more").mkdir()
        shutil.copy(copy / kind / f"view_0.{suffix}", copy / kind / "more" / f"view_0.{suffix}")
    manifest = build_manifest(small_job("pretrain", copy, tmp_path))
    assert "more/view_0.png" in manifest.clear and "view_0.png" in manifest.clear
    assert manifest.depth[manifest.clear.index("more/view_0.png")] == "more/view_0.npy"


def test_without_images_or_matches_it_says_so(copy, tmp_path):
    (copy / "empty").mkdir()
    with pytest.raises(ManifestError, match="data.clear: no images"):
        build_manifest(small_job("pretrain", copy, tmp_path, data={"clear": str(copy / "empty")}))
    with pytest.raises(ManifestError, match="data.depth: none of the 6 depth maps"):
        build_manifest(small_job("pretrain", copy, tmp_path, data={"depth": str(copy / "hazy")}))


def test_held_out_images_need_their_truth(copy):
    section = TruthSection(hazy=str(copy / "hazy"), clear=str(copy / "hazy_truth"))
    pairs = pair_validation_images(section, "evaluate")
    assert pairs[0] == ("photo_0.png", "photo_0.png") and len(pairs) == 6
    (copy / "hazy_truth/photo_2.png").unlink()
    with pytest.raises(ManifestError, match="evaluate.clear: 1 of 6 .*photo_2.png: no clear image of this name"):
        pair_validation_images(section, "evaluate")


def test_the_digest_follows_the_names(copy, tmp_path):
    job = small_job("pretrain", copy, tmp_path)
    before = build_manifest(job).compute_digest()
    assert build_manifest(job).compute_digest() == before
    (copy / "clear/view_0.png").unlink()
    assert build_manifest(job).compute_digest() != before


def paired(root):
    return {"paired": {"hazy": str(root / "hazy"), "clear": str(root / "hazy_truth")}}


@pytest.mark.parametrize("kind", ["pretrain", "colabator"])
def test_paired_images_match_by_stem_and_leftovers_are_named(kind, copy, tmp_path):
    shutil.move(copy / "hazy/photo_0.png", copy / "hazy/photo_0.jpg")
    (copy / "hazy_truth/photo_1.png").unlink()
    (copy / "hazy_truth/photo_2.jpg").write_bytes(b"x")
    (copy / "hazy_truth/stray.png").write_bytes(b"x")
    manifest = build_manifest(small_job(kind, copy, tmp_path, data=paired(copy)))
    assert manifest.paired_hazy == ("photo_0.jpg", "photo_3.png", "photo_4.png", "photo_5.png")
    assert manifest.clear == ("photo_0.png", "photo_3.png", "photo_4.png", "photo_5.png")
    assert (manifest.depth, len(manifest.hazy)) == (None, 0 if kind == "pretrain" else 6)
    assert manifest.skipped == {
        str(copy / "hazy/photo_1.png"): "no clean image of this name",
        str(copy / "hazy/photo_2.png"): "2 clean images match it: photo_2.jpg, photo_2.png",
        str(copy / "hazy_truth/stray.png"): "clean image that matches no image",
    }
    assert manifest.num_images == 4 + 3 + len(manifest.hazy)


def test_paired_folders_without_images_or_matches_are_named(copy, tmp_path):
    (copy / "empty").mkdir()
    sides = paired(copy)["paired"]
    for side in sides:
        data = {"paired": sides | {side: str(copy / "empty")}}
        with pytest.raises(ManifestError, match=f"data.paired.{side}: no images"):
            build_manifest(small_job("pretrain", copy, tmp_path, data=data))
    data = {"paired": sides | {"hazy": str(copy / "clear")}}
    with pytest.raises(ManifestError, match="data.paired.clear: none of the 6 images below .* is named like one below"):
        build_manifest(small_job("pretrain", copy, tmp_path, data=data))


def test_the_digest_covers_the_degraded_half_of_the_pairs(copy, tmp_path):
    job = small_job("pretrain", copy, tmp_path, data=paired(copy))
    before = build_manifest(job).compute_digest()
    shutil.move(copy / "hazy/photo_0.png", copy / "hazy/photo_0.jpg")
    assert build_manifest(job).compute_digest() != before


def test_held_out_sets_know_their_names(copy, tmp_path):
    one = {"hazy": str(copy / "hazy"), "clear": str(copy / "hazy_truth")}
    other = {"hazy": str(copy / "clear")}
    sets = list_validation_sets(
        small_job("pretrain", copy, tmp_path, data={"validation": one, "validation_sets": {"far": other}})
    )
    assert [(held.prefix, held.hazy_root, held.clear_root, len(held.pairs)) for held in sets] == [
        ("val", one["hazy"], one["clear"], 6),
        ("val/far", other["hazy"], None, 8),
    ]
    assert list_validation_sets(small_job("pretrain", copy, tmp_path)) == []
    wrong = {"far": {"hazy": str(copy / "hazy"), "clear": str(copy / "clear")}}
    with pytest.raises(ManifestError, match="^data.validation_sets.far.clear: 6 of 6 hazy images have no truth"):
        list_validation_sets(small_job("pretrain", copy, tmp_path, data={"validation_sets": wrong}))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_public_data_sets_pair_by_their_own_names(make, dataset, tmp_path):
    named = make(tmp_path / "named")
    job = small_job("pretrain", dataset, tmp_path, data={"paired": named.keys, "validation": named.keys})
    manifest = build_manifest(job)
    assert manifest.paired_hazy is not None
    assert dict(zip(manifest.paired_hazy, manifest.clear, strict=True)) == named.pairs and manifest.skipped == {}
    (held_out,) = list_validation_sets(job)
    assert dict(held_out.pairs) == named.pairs
    refuse_other_sizes(job, manifest, [held_out])


def refusal(keys, dataset, tmp_path, section="paired"):
    """The line of a job with these keys."""
    job = small_job("pretrain", dataset, tmp_path, data={section: keys})
    with pytest.raises(ManifestError) as caught:
        refuse_other_sizes(job, build_manifest(job), list_validation_sets(job))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize("section", ["paired", "validation"])
def test_a_pattern_that_matches_nothing_or_two_truths_is_refused(section, dataset, tmp_path):
    named = make_its(tmp_path / "its")
    truth = "clean image" if section == "paired" else "truth"
    assert refusal(named.keys | {"match": "^no(.+)"}, dataset, tmp_path, section) == (
        f"data.{section}.match: 6 of 6 hazy images have no single {truth} by ^no(.+) "
        "(/its/hazy/10_1_0.80.png: no match; /its/hazy/10_2_0.90.png: no match; /its/hazy/1_1_0.80.png: no match)"
    )
    image = "clean image" if section == "paired" else "clear image"
    assert refusal(named.keys | {"match": "^([0-9])"}, dataset, tmp_path, section) == (
        f"data.{section}.match: 4 of 6 hazy images have no single {truth} by ^([0-9]) "
        f"(/its/hazy/10_1_0.80.png: 2 {image}s match it: 1.png, 10.png; "
        f"/its/hazy/10_2_0.90.png: 2 {image}s match it: 1.png, 10.png; "
        f"/its/hazy/1_1_0.80.png: 2 {image}s match it: 1.png, 10.png)"
    )


def test_a_missing_truth_is_refused_in_validation_and_skipped_in_training(dataset, tmp_path):
    named = make_nh_haze(tmp_path / "nh")
    (tmp_path / "nh/02_GT.png").unlink()
    assert refusal(named.keys, dataset, tmp_path, "validation") == (
        r"data.validation.match: 1 of 3 hazy images have no single truth by ^(\d+)_hazy$ and ^(\d+)_GT$ "
        "(/nh/02_hazy.png: no clear image of the key 02)"
    )
    manifest = build_manifest(small_job("pretrain", dataset, tmp_path, data={"paired": named.keys}))
    assert manifest.skipped == {str(tmp_path / "nh/02_hazy.png"): "no clean image of the key 02"}
    everything = named.keys | {"match_clear": r"^(\d+)_"}
    assert refusal(everything, dataset, tmp_path) == (
        r"data.paired.match_clear: ^(\d+)_ matches all 5 images below /nh, so that none of them is hazy"
    )


@pytest.mark.parametrize("section", ["paired", "validation"])
def test_a_truth_of_another_size_is_refused_before_the_start(section, dataset, tmp_path):
    named = make_sots_indoor(tmp_path / "sots")
    assert refusal(named.keys | {"crop_truth": False}, dataset, tmp_path, section) == (
        f"data.{section}.clear: /sots/hazy/1400_1.png: degraded image of 64 x 52 px does not fit its clean one of "
        "69 x 57 px (crop_truth: true takes the centre of the clean one)"
    )
    swapped = named.keys | {"hazy": named.keys["clear"], "clear": named.keys["hazy"], "match_clear": "^(.*)_1$"}
    line = refusal(swapped | {"match": "^(.*)$"}, dataset, tmp_path)
    assert line.endswith("degraded image of 69 x 57 px does not fit its clean one of 64 x 52 px")


def test_pairs_of_packs_match_too(dataset, tmp_path):
    named = make_sots_indoor(tmp_path / "sots")
    keys = dict(named.keys)
    for side in ("hazy", "clear"):
        packed(keys[side], tmp_path / side)
        keys[side] = str(tmp_path / side)
    job = small_job("pretrain", dataset, tmp_path, data={"paired": keys})
    manifest = build_manifest(job)
    assert manifest.paired_hazy is not None
    assert dict(zip(manifest.paired_hazy, manifest.clear, strict=True)) == named.pairs
    refuse_other_sizes(job, manifest, [])
