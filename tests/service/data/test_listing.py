"""Which files of a folder are images, as people have their folders, and what is told of the others."""

import unicodedata

import boto3
import numpy as np
import pytest

from corun_ray.config.jobs import DehazeJob
from corun_ray.config.loading import build_job
from corun_ray.config.pairing import TruthSection
from corun_ray.service.check import check_job
from corun_ray.service.data.listing import IMAGE_SUFFIXES, RESTORED_MARK, ManifestError, list_folder
from corun_ray.service.data.manifest import build_manifest, list_image_folder, list_images, pair_validation_images
from corun_ray.service.data.packing import find_written_shards, plan_pack
from corun_ray.service.data.results import find_results
from corun_ray.service.storage import StorageError
from tests.conftest import photograph, write_image
from tests.service.jobs import small_job

LOST = "a link that leads nowhere"


def make_someones_folder(root):
    """Two photographs among what devices, archives and people leave beside them."""
    picture = photograph(np.random.default_rng(0), 40, 48)
    for name in ("a.jpg", ".thumbnails/a.jpg", "@eaDir/a.jpg/SYNO_THUMB.jpg", "__MACOSX/a.jpg", "b.jpg"):
        write_image(root / name, picture)
    (root / "b.jpg").rename(root / "b.jfif")
    for name in ("c.heic", "notes.txt", "more.TXT", ".DS_Store"):
        (root / name).write_text("autumn")
    (root / "lost.jpg").symlink_to("nowhere.jpg")
    (root / "round").symlink_to(".")
    return root


@pytest.fixture
def someones(tmp_path):
    return make_someones_folder(tmp_path / "in")


def test_a_folder_of_someone(someones):
    found = list_image_folder(str(someones), "INPUT")
    assert list(found.select(IMAGE_SUFFIXES)) == ["a.jpg", "b.jfif"]
    assert found.count_others(IMAGE_SUFFIXES) == ".txt 2, .heic 1"
    assert found.list_skipped(IMAGE_SUFFIXES) == {
        str(someones / "lost.jpg"): LOST,
        str(someones / "round"): "a link to a folder that holds it",
    }


def test_every_reader_of_images_sees_the_same_ones(someones, dataset, tmp_path):
    manifest = build_manifest(small_job("pretrain", dataset, tmp_path, data={"clear": str(someones), "depth": None}))
    assert manifest.clear == ("a.jpg", "b.jfif") and manifest.skipped[str(someones / "lost.jpg")] == LOST
    assert manifest.passed_over == {str(someones): ".txt 2, .heic 1"}
    plan = plan_pack(str(someones), str(tmp_path / "pack"), None, 1, False)
    assert (plan.num_images, plan.skipped[str(someones / "lost.jpg")]) == (2, LOST)
    assert plan.passed_over == ".txt 2, .heic 1"

    # An evaluation names the link when it reads the file.
    passed_over: dict[str, str] = {}
    pairs = pair_validation_images(TruthSection(hazy=str(someones)), "evaluate", None, passed_over)
    assert pairs == [("a.jpg", None), ("b.jfif", None), ("lost.jpg", None)]
    assert passed_over == {str(someones): ".txt 2, .heic 1"}

    job = build_job({"kind": "dehaze", "name": "x", "dehaze": dehaze_keys(someones, tmp_path / "out")})
    notes, _ = check_job(job, [])
    assert "data      2 images to dehaze" in notes and "others    passed over: .txt 2, .heic 1" in notes
    assert f"skipped   {someones}/lost.jpg: {LOST}" in notes


def dehaze_keys(source, target):
    return {"input": str(source), "output": str(target), "model": "corun-small"}


def test_a_folder_without_images_tells_what_it_holds(tmp_path):
    (tmp_path / "a.heic").touch()
    (tmp_path / "lost.png").symlink_to("nowhere")
    with pytest.raises(ManifestError, match=r"among the 1 files below \S+: .heic 1; \S+/lost.png: a link that leads"):
        list_images(str(tmp_path), "INPUT")


def test_one_file_is_a_folder_of_one(someones, tmp_path):
    found = list_image_folder(str(someones / "b.jfif"), "INPUT")
    assert (found.root, list(found.infos), found.bad_links) == (str(someones), ["b.jfif"], {})
    with pytest.raises(ManifestError, match="among the 1 files below .*: .txt 1"):
        list_image_folder(str(someones / "notes.txt"), "INPUT")
    with pytest.raises(ManifestError, match=r"data.clear: \S+/a.jpg is a file, expected a folder"):
        build_manifest(small_job("pretrain", someones, tmp_path, data={"clear": str(someones / "a.jpg")}))


def test_a_bucket_is_listed_like_a_folder(s3_server, someones):
    client = boto3.client("s3")
    client.create_bucket(Bucket="someones")
    for path in someones.rglob("*"):
        if path.is_file() and "round" not in path.parts:
            client.upload_file(str(path), "someones", f"in/{path.relative_to(someones)}")
    client.upload_file(str(someones / "a.jpg"), "someones", "in/out/a.jpg")

    found = list_image_folder("s3://someones/in", "INPUT", {"OUTPUT": "s3://someones/in/out/"})
    assert list(found.select(IMAGE_SUFFIXES)) == ["a.jpg", "b.jfif"]
    assert found.count_others(IMAGE_SUFFIXES) == ".txt 2, .heic 1"
    one = list_image_folder("s3://someones/in/a.jpg", "INPUT")
    assert (one.root, list(one.infos)) == ("s3://someones/in", ["a.jpg"])
    with pytest.raises(ManifestError, match="OUTPUT: s3://someones/in/ is the folder of INPUT: choose another"):
        list_image_folder("s3://someones/in/", "INPUT", {"OUTPUT": "s3://someones/in/"})


# --- What the job itself writes ---


def test_what_lies_in_an_output_is_no_input(someones, tmp_path):
    for name in ("out/a.jpg", "out/deep/b.jpg"):
        write_image(someones / name, photograph(np.random.default_rng(0), 40, 48))
    (tmp_path / "other").symlink_to(someones)
    (someones / "by_link").symlink_to("out/deep")
    (someones / "result.jpg").symlink_to("out/a.jpg")
    for output in (someones / "out", tmp_path / "other/out", f"file://{someones}/out"):
        found = list_image_folder(str(someones), "INPUT", {"OUTPUT": str(output)})
        assert list(found.select(IMAGE_SUFFIXES)) == ["a.jpg", "b.jfif"], output
    with pytest.raises(ManifestError, match="OUTPUT: .*other is the folder of INPUT"):
        list_folder(str(someones), "INPUT", {"OUTPUT": str(tmp_path / "other")})


def test_what_an_earlier_call_has_restored_is_no_input(someones):
    write_image(someones / "first/deep/a.jpg", photograph(np.random.default_rng(0), 40, 48))
    (someones / "first" / RESTORED_MARK).touch()
    found = list_image_folder(str(someones), "INPUT", {"OUTPUT": str(someones / "second")})
    assert list(found.select(IMAGE_SUFFIXES)) == ["a.jpg", "b.jfif"]
    assert found.list_skipped(IMAGE_SUFFIXES)[str(someones / "first")] == "a folder of restored images"

    # It is where it is named, and it is not told of where this call writes.
    assert list(list_image_folder(str(someones / "first"), "INPUT").infos) == ["deep/a.jpg"]
    assert list_image_folder(str(someones), "INPUT", {"OUTPUT": str(someones / "first")}).results == ()


def test_no_job_reads_the_pictures_of_its_own_runs(dataset, tmp_path):
    root = tmp_path / "hazy"
    for name in ("a.png", "runs/evaluate-1/contact_sheet.png"):
        write_image(root / name, photograph(np.random.default_rng(0), 72, 96))
    section = TruthSection(hazy=str(root))
    assert pair_validation_images(section, "evaluate", str(root / "runs")) == [("a.png", None)]
    data = {"clear": str(root), "depth": None}
    assert build_manifest(small_job("pretrain", dataset, root, data=data)).clear == ("a.png",)
    with pytest.raises(ManifestError, match="storage: .* is the folder of data.clear: choose another"):
        build_manifest(small_job("pretrain", dataset, root, data=data | {"clear": str(root / "runs")}))
    with pytest.raises(StorageError, match=r"/../hazy holds a.png, which is no part of a pack"):
        find_written_shards(plan_pack(str(root), f"{root}/../hazy", None, 1, False))


@pytest.mark.parametrize("kind", ["dehaze", "depth"])
def test_check_refuses_an_output_that_is_the_input(someones, kind):
    keys = dehaze_keys(someones, f"{someones}/../in")
    if kind == "depth":
        keys = {"input": keys["input"], "output": keys["output"], "weights": str(someones)}
    job = build_job({"kind": kind, "name": "x", kind: keys})
    assert isinstance(job, DehazeJob) == (kind == "dehaze")
    _, mistakes = check_job(job, [])
    assert f"{kind}.output: {someones}/../in is the folder of {kind}.input: choose another" in mistakes


def test_results_pair_in_one_form_of_unicode(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / f"{unicodedata.normalize('NFD', 'é')}.png").touch()
    job = build_job({"kind": "evaluate", "name": "x", "evaluate": {"hazy": "x", "models": {"theirs": str(folder)}}})
    (found,) = find_results(job.evaluate, ["é.jpg"]).values()
    assert [*found.images] == ["é.jpg"]
    (folder / "net.pth").touch()
    with pytest.raises(ManifestError, match="both a model"):
        find_results(job.evaluate, ["é.jpg"])
