"""Packs: the same samples as from the files, and one line for what is wrong with one."""

import shutil
import subprocess
import sys

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io

from corun_ray.core.data.images import decode_depth
from corun_ray.service.check import check_job
from corun_ray.service.data.manifest import ManifestError, build_manifest, list_images
from corun_ray.service.data.packing import find_written_shards, plan_pack, write_index, write_shard
from corun_ray.service.data.packs import INDEX, open_pack
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.storage import Location, MissingFile, StorageError, locate
from tests.conftest import write_image
from tests.service.jobs import small_job
from tests.service.samples import assert_same_samples


def ignore(bad_files):
    raise AssertionError(f"unexpected bad files: {bad_files}")


def packed(images, output, depth=None, shard_mib=1, keep_png=False):
    """A pack written in this process, without Ray; the number of shards that were written for it."""
    plan = plan_pack(str(images), str(output), None if depth is None else str(depth), shard_mib, keep_png)
    there = find_written_shards(plan)
    for shard in range(len(plan.shards)):
        if shard not in there:
            write_shard(plan, shard)
    return write_index(plan), len(plan.shards) - len(there)


def opened(place):
    folder = locate(str(place))
    return open_pack(folder, folder.list_infos())


def samples_of(job):
    return SampleMaker(job, build_manifest(job), 32, ignore)({"id": np.arange(20)})


@pytest.mark.parametrize("synthesis", ["stream", "worker"])
def test_samples_from_a_pack_are_those_of_the_folders(dataset, tmp_path, synthesis):
    packed(dataset / "clear", tmp_path / "clear", dataset / "depth")
    packed(dataset / "hazy", tmp_path / "hazy")
    data = {"clear": str(tmp_path / "clear"), "depth": str(tmp_path / "clear"), "hazy": str(tmp_path / "hazy")}
    folders, packs = (
        small_job("colabator", dataset, tmp_path, data=more | {"synthesis": synthesis}) for more in ({}, data)
    )
    assert_same_samples(samples_of(packs), samples_of(folders))
    assert any(note.endswith("a depth map each, 6 real hazy") for note in check_job(packs, [])[0])


def test_a_pack_can_be_half_of_the_data(dataset, tmp_path):
    packed(dataset / "clear", tmp_path / "clear", dataset / "depth")
    for data in ({"clear": str(tmp_path / "clear")}, {"depth": str(tmp_path / "clear")}):
        folders, packs = (small_job("pretrain", dataset, tmp_path, data=more) for more in ({}, data))
        assert_same_samples(samples_of(packs), samples_of(folders))
    without = small_job("pretrain", dataset, tmp_path, data={"clear": str(tmp_path / "clear"), "depth": None})
    plain = small_job("pretrain", dataset, tmp_path, data={"depth": None})
    assert_same_samples(samples_of(without), samples_of(plain))
    assert build_manifest(without).compute_digest() == build_manifest(plain).compute_digest()


def test_data_is_known_again_elsewhere_and_in_a_pack(large, tmp_path):
    moved = shutil.copytree(large / "clear", tmp_path / "bucket/images").parent
    shutil.copytree(large / "depth", moved / "maps")
    packed(large / "clear", large / "pack", large / "depth")
    # What shows who writes a pack is no part of it.
    (large / "pack/drivers").mkdir()
    (large / "pack/drivers/000001.json").write_text("{}")
    assert packed(large / "clear", large / "pack", large / "depth")[1] == 0
    assert (large / "pack/drivers/000001.json").exists()

    places = [(large / "clear", large / "depth"), (moved / "images", moved / "maps"), (large / "pack", large / "pack")]
    digests = []
    for clear, depth in places:
        job = small_job("pretrain", large, tmp_path, data={"clear": str(clear), "depth": str(depth)})
        digests.append(build_manifest(job).files)
    assert len(set(digests)) == 1

    # Another image of the same name is no longer the same data.
    image = moved / "images/day 0/0.png"
    image.write_bytes(image.read_bytes() + b"more")
    job = small_job("pretrain", large, tmp_path, data={"clear": str(moved / "images"), "depth": str(moved / "maps")})
    assert build_manifest(job).files != digests[0]


def test_pairs_come_from_packs_too(dataset, tmp_path):
    packed(dataset / "clear", tmp_path / "pack")
    folder, pack = str(dataset / "clear"), str(tmp_path / "pack")
    jobs = (
        small_job("pretrain", dataset, tmp_path, data={"paired": {"hazy": one, "clear": one}}) for one in (folder, pack)
    )
    assert_same_samples(*map(samples_of, jobs))


def test_shards_are_ordinary_parquet_of_the_size_asked_for(large):
    result, _ = packed(large / "clear", large / "pack", large / "depth", shard_mib=2)
    names = [name for name in locate(str(large / "pack")).list_files() if name != INDEX and ".index." not in name]
    assert (result.images, result.shards, result.skipped) == (6, 3, {}) and len(names) == 3
    rows = [row for name in names for row in pq.read_table(large / "pack" / name).to_pylist()]
    assert [row["key"] for row in rows] == list_images(str(large / "clear"), "")
    for row in rows:
        assert row["image"] == (large / "clear" / row["key"]).read_bytes()
        depth = decode_depth((large / "depth" / row["key"]).read_bytes(), ".png")
        ours = decode_depth(row["depth"], ".npy")
        assert row["depth_key"].endswith(".npy") and ours.dtype == depth.dtype == np.uint16
        assert np.array_equal(ours, depth)


def test_depth_of_matlab_gives_the_same_samples_from_folder_and_pack(dataset, tmp_path):
    for path in (dataset / "depth").iterdir():
        depth = np.load(path)[..., None]
        (tmp_path / "depth").mkdir(exist_ok=True)
        scipy.io.savemat(tmp_path / "depth" / f"{path.stem}.mat", {"depth": depth})
    packed(dataset / "clear", tmp_path / "pack", tmp_path / "depth")
    assert all(key.endswith(".npy") for key in opened(tmp_path / "pack").depths)
    plain = samples_of(small_job("pretrain", dataset, tmp_path))
    for data in ({"depth": str(tmp_path / "depth")}, dict.fromkeys(("clear", "depth"), str(tmp_path / "pack"))):
        assert_same_samples(samples_of(small_job("pretrain", dataset, tmp_path, data=data)), plain)


def test_depth_in_png_may_stay(large):
    packed(large / "clear", large / "pack", large / "depth", keep_png=True)
    pack = opened(large / "pack")
    assert [*pack.depths] == [*pack.images]
    assert pack.read(pack.depths["day 1/3.png"]) == (large / "depth/day 1/3.png").read_bytes()


def test_packing_again_writes_what_is_missing_or_has_changed(large):
    arguments = (large / "clear", large / "pack", None)
    assert packed(*arguments)[1] == 6
    first = locate(str(large / "pack")).list_files()
    assert packed(*arguments)[1] == 0
    lost = next(name for name in first if ".index." in name)
    (large / "pack" / lost).unlink()
    assert packed(*arguments)[1] == 1
    assert locate(str(large / "pack")).list_files() == first
    write_image(large / "clear/day 1/5.png", np.zeros((16, 16, 3), np.uint8))
    (large / "clear/day 0/0.png").unlink()
    result, written = packed(*arguments)
    assert result.images == 5 and written >= 1
    pack = opened(large / "pack")
    assert pack.read(pack.images["day 1/5.png"]) == (large / "clear/day 1/5.png").read_bytes()
    assert len(locate(str(large / "pack")).list_files()) == 1 + 2 * len(pack.shards), "old shards are gone"


@pytest.mark.parametrize("suffix", [".parquet", ".index.parquet"])
@pytest.mark.parametrize("keep", [slice(None, -9), slice(None, 0)], ids=["cut", "empty"])
def test_packing_again_mends_a_damaged_shard(large, suffix, keep):
    packed(large / "clear", large / "pack")
    name = opened(large / "pack").shards[3].removesuffix(".parquet") + suffix
    content = (large / "pack" / name).read_bytes()
    (large / "pack" / name).write_bytes(content[keep])
    assert packed(large / "clear", large / "pack")[1] == 1
    assert (large / "pack" / name).read_bytes() == content
    opened(large / "pack")


def test_packing_again_takes_what_could_not_be_read_before(large, monkeypatch):
    read, lost = Location.read, str(large / "clear/day 0/2.png")

    def reads_all_but_one(place):
        if place.path == lost:
            raise MissingFile(f"cannot read {lost}: Permission denied")
        return read(place)

    with monkeypatch.context() as patched:
        patched.setattr(Location, "read", reads_all_but_one)
        result, _ = packed(large / "clear", large / "pack")
        assert result.skipped == {lost: f"cannot read {lost}: Permission denied"} and result.images == 5
    result, written = packed(large / "clear", large / "pack")
    assert (written, result.images, result.skipped) == (1, 6, {})


def test_until_packing_again_has_ended_the_old_pack_is_whole(large):
    packed(large / "clear", large / "pack")
    before = (large / "clear/day 0/0.png").read_bytes()
    write_image(large / "clear/day 0/0.png", np.zeros((16, 16, 3), np.uint8))
    write_shard(plan_pack(str(large / "clear"), str(large / "pack"), None, 1, False), 0)
    pack = opened(large / "pack")
    assert pack.read(pack.images["day 0/0.png"]) == before


def test_files_that_cannot_be_packed_are_named(large):
    (large / "depth/day 0/0.png").write_text("not a picture")
    (large / "depth/day 0/2.png").unlink()
    (large / "depth/alone.npy").write_bytes(b"")
    result, _ = packed(large / "clear", large / "pack", large / "depth")
    reasons = {uri.removeprefix(f"{large}/"): reason for uri, reason in result.skipped.items()}
    assert result.images == 4 and reasons.keys() == {"clear/day 0/0.png", "clear/day 0/2.png", "depth/alone.npy"}
    assert reasons["clear/day 0/0.png"].endswith("depth/day 0/0.png: not an image, or a damaged one")
    assert reasons["clear/day 0/2.png"] == "no depth map of this name"


def test_what_is_wrong_with_a_pack_is_one_line(large):
    packed(large / "clear", large / "pack")
    uri, shards = str(large / "pack"), opened(large / "pack").shards
    job = small_job("pretrain", large, large, data={"clear": uri, "depth": uri})
    with pytest.raises(ManifestError, match=r"^data\.depth: the pack in .* holds no depth \(corun-ray pack --depth"):
        build_manifest(job)
    with pytest.raises(ManifestError, match=r"^INPUT: .* holds a pack, which only training can read$"):
        list_images(uri, "INPUT")

    kept = (large / "pack" / shards[2]).read_bytes()
    (large / "pack" / shards[2]).write_bytes(kept[:-9])
    with pytest.raises(StorageError, match=rf"damaged: {shards[2]} has not {len(kept)} bytes; run its"):
        opened(uri)
    (large / "pack" / shards[2]).unlink()
    with pytest.raises(StorageError, match=rf"^the pack in .* is damaged: {shards[2]} is missing; run its"):
        opened(uri)
    (large / "pack" / INDEX).write_bytes(b"PAR1 no PAR1")
    with pytest.raises(StorageError, match=r"index\.parquet is no index of a pack: "):
        opened(uri)
    (large / "pack" / INDEX).unlink()
    with pytest.raises(StorageError, match=r"^the pack in .* is not complete: no index\.parquet; run its"):
        opened(uri)


def test_a_damaged_image_is_set_aside_under_its_own_name(large):
    (large / "clear/day 0/2.png").write_text("not a picture")
    packed(large / "clear", large / "pack")
    job = small_job("pretrain", large, large, data={"clear": str(large / "pack"), "depth": None})
    bad = {}
    SampleMaker(job, build_manifest(job), 32, bad.update)({"id": np.arange(6)})
    assert bad == {f"{large}/pack/day 0/2.png": "not an image, or a damaged one"}


def test_other_files_are_not_written_among(large):
    with pytest.raises(StorageError, match=r"holds day 0/0\.png, which is no part of a pack: choose an empty place"):
        packed(large / "clear", large / "clear")


def test_from_a_bucket_to_a_bucket_by_the_command(s3_server, dataset, tmp_path):
    client = boto3.client("s3")
    client.create_bucket(Bucket="packs")
    for path in dataset.rglob("*.*"):
        client.upload_file(str(path), "packs", str(path.relative_to(dataset)))
    command = [sys.executable, "-m", "corun_ray", "pack", "s3://packs/clear", "s3://packs/pack"]
    command += ["--depth", "s3://packs/depth"]
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True).stdout
    assert "pack, dry run" in dry and "1 shards, 0 of them there already" in dry
    assert not locate("s3://packs/pack").exists()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert f"done: {len([*(dataset / 'clear').iterdir()])} images in 1 shards" in ran.stdout
    data = {"clear": "s3://packs/pack", "depth": "s3://packs/pack"}
    folders, packs = (small_job("pretrain", dataset, tmp_path, data=more) for more in ({}, data))
    assert_same_samples(samples_of(packs), samples_of(folders))
