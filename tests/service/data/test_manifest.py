import shutil

import pytest

from corun_ray.service.data.manifest import ManifestError, build_manifest, list_validation_sets, pair_validation_images
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
    pairs = pair_validation_images(str(copy / "hazy"), str(copy / "hazy_truth"), "evaluate")
    assert pairs[0] == ("photo_0.png", "photo_0.png") and len(pairs) == 6
    (copy / "hazy_truth/photo_2.png").unlink()
    with pytest.raises(ManifestError, match="evaluate.clear: 1 of 6 .*photo_2.png: no clear image of this name"):
        pair_validation_images(str(copy / "hazy"), str(copy / "hazy_truth"), "evaluate")


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
