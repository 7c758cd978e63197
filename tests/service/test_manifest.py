import shutil

import pytest

from corun_ray.service.manifest import ManifestError, build_manifest, held_out
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
    reasons = {uri.rsplit("/", 1)[1]: reason for uri, reason in manifest.set_aside.items()}
    assert reasons == {
        "view_3.png": "no depth map of this name",
        "view_5.png": "2 depth maps match it: view_5.npy, view_5.png",
        "stray.npy": "depth map of no image",
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
    pairs = held_out(str(copy / "hazy"), str(copy / "hazy_truth"), "evaluate")
    assert pairs[0] == ("photo_0.png", "photo_0.png") and len(pairs) == 6
    (copy / "hazy_truth/photo_2.png").unlink()
    with pytest.raises(ManifestError, match="evaluate.clear: 1 of 6 .*photo_2.png: no clear image of this name"):
        held_out(str(copy / "hazy"), str(copy / "hazy_truth"), "evaluate")


def test_the_digest_follows_the_names(copy, tmp_path):
    job = small_job("pretrain", copy, tmp_path)
    before = build_manifest(job).digest()
    assert build_manifest(job).digest() == before
    (copy / "clear/view_0.png").unlink()
    assert build_manifest(job).digest() != before
