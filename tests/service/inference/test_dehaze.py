"""Batch dehazing by Ray Data, with a network that no training has touched."""

import contextlib
import io
import os
import shutil

import cv2
import numpy as np
import pytest
import torch

from corun_ray.config.loading import build_job
from corun_ray.config.tasks import DehazeSection
from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.inference.self_ensemble import restore_by_self_ensemble
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.service.data.listing import RESTORED_MARK
from corun_ray.service.inference.dehaze import dehaze
from corun_ray.service.inference.made_with import SELF_ENSEMBLE_FILE
from corun_ray.service.inference.photos import Photo, write_photo
from corun_ray.service.jobs import run_jobs
from corun_ray.service.models.sources import Model, ModelSourceError
from corun_ray.service.storage import StorageError
from corun_ray.service.telemetry.console import Console
from tests.conftest import photograph, write_image


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = CORUN(2, 4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Model(NetworkSpec("corun", {"stages": 2, "width": 4}), network.state_dict(), {})


@pytest.fixture(scope="module")
def photographs(dataset, tmp_path_factory):
    """Two of the dataset's hazy images: an actor for each image starts, which takes longer than its image."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("photo_0.png", "photo_1.png"):
        shutil.copy(dataset / "hazy" / name, folder)
    return folder


def run(source, target, model, resume=False, **options):
    return dehaze(DehazeSection(input=str(source), output=str(target), model="x", **options), model, resume=resume)


@pytest.fixture(scope="module")
def job_run(local_ray, model, photographs, tmp_path_factory):
    """The photographs, restored by a job with nothing else in it: where they are, and what it said."""
    folder, said = tmp_path_factory.mktemp("job"), io.StringIO()
    torch.save(model.params, folder / "net.pth")
    section = {"input": str(photographs), "output": str(folder / "out"), "model": str(folder / "net.pth")}
    with contextlib.redirect_stdout(said):
        run_jobs([build_job({"kind": "dehaze", "name": "photos", "dehaze": section})], Console())
    return folder / "out", said.getvalue()


@pytest.fixture(scope="module")
def restored(job_run):
    return job_run[0]


def expected(model, path) -> np.ndarray:
    return to_image(restore(model.build().eval(), to_tensor(decode_image(path.read_bytes()))).scene)


def below(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != RESTORED_MARK]
    return {str(path.relative_to(folder)): path for path in files}


def test_names_folders_sizes_and_formats_stay_and_what_is_left_out_is_named(local_ray, model, tmp_path):
    rng = np.random.default_rng(2)
    source, target = tmp_path / "in", tmp_path / "out"
    shapes = {"a.png": (40, 64), "a.jpg": (40, 64), "deep/b.JPG": (33, 47), "c.webp": (90, 16), "d.tiff": (20, 30)}
    for name, shape in shapes.items():
        write_image(source / name, photograph(rng, *shape))
    fine = (np.linspace(9000, 52000, 48 * 40 * 3).reshape(48, 40, 3)).astype(np.uint16)
    for suffix in ("png", "tif"):
        write_image(source / f"16 bits.{suffix}", fine)
    (source / "broken.png").write_text("no picture")
    write_image(source / "tiny.png", photograph(rng, 12, 40))
    result = run(source, target, model)
    assert result.written == 7
    assert result.bad_files[str(source / "broken.png")].startswith("not an image")
    assert "too small" in result.bad_files[str(source / "tiny.png")]
    written = below(target)

    # 16 bits stay 16 bits.
    scene = to_image(restore(model.build().eval(), to_tensor(fine)).scene, np.uint16)
    for suffix in ("png", "tif"):
        pixels = cv2.imread(str(written.pop(f"16 bits.{suffix}")), cv2.IMREAD_UNCHANGED)
        assert pixels.dtype == np.uint16 and len(np.unique(pixels)) > 1000
        assert np.abs(pixels[..., ::-1].astype(int) - scene).max() <= 3

    assert {name: decode_image(path.read_bytes()).shape[:2] for name, path in written.items()} == shapes
    for name, path in written.items():
        as_it_should_be = write_photo(Photo(expected(model, source / name)), path.suffix)
        difference = decode_image(path.read_bytes()).astype(int) - decode_image(as_it_should_be)
        assert np.abs(difference).mean() < 0.1, name
    starts = {name: path.read_bytes()[:4] for name, path in written.items()}
    assert starts["a.jpg"][:3] == starts["deep/b.JPG"][:3] == b"\xff\xd8\xff"
    assert starts["c.webp"] == b"RIFF" and starts["d.tiff"] in (b"II*\0", b"MM\0*")


def test_the_transmission_and_a_picture_of_each_stage_are_written_if_asked_for(restored, photographs, model, tmp_path):
    write_image(tmp_path / "photo_0.png", np.zeros((16, 16, 3), np.uint8))  # of an earlier call, which is not resumed
    (tmp_path / SELF_ENSEMBLE_FILE).write_text("of that call too")
    assert run(photographs, tmp_path, model, transmission=True, stages=True).written == 2
    assert not (tmp_path / SELF_ENSEMBLE_FILE).exists()
    for name in ("photo_0", "photo_1"):
        assert (restored / f"{name}.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()
        hazy = to_tensor(decode_image((photographs / f"{name}.png").read_bytes()))
        found = cv2.imread(str(tmp_path / f"{name}.transmission.png"), cv2.IMREAD_UNCHANGED)
        transmission = restore(model.build().eval(), hazy).transmission[0, 0].numpy()
        assert found.dtype == np.uint16 and np.abs(found / 65535 - transmission).max() < 1e-3
        # The hazy image and two stages below each other; scene, transmission, re-hazed and its error side by side.
        picture = decode_image((tmp_path / f"{name}.stages.png").read_bytes())
        assert picture.shape[0] > 3 * 200 and picture.shape[1] > 4 * 320 and picture.std() > 20


def test_resuming_passes_over_what_is_done_in_the_format_asked_for(restored, model, photographs, tmp_path):
    shutil.copytree(restored, tmp_path, dirs_exist_ok=True)
    write_image(tmp_path / "photo_0.jpg", np.zeros((16, 16, 3), np.uint8))
    kept = below(tmp_path)
    for path in kept.values():
        os.utime(path, (1, 1))
    ticks = []
    section = DehazeSection(input=str(photographs), output=str(tmp_path), model="x", format="jpg")
    result = dehaze(section, model, lambda done, total: ticks.append((done, total)), resume=True)
    assert (result.written, result.already_written, ticks) == (1, 1, [(1, 1)])
    assert below(tmp_path).keys() - kept.keys() == {"photo_1.jpg"}
    assert all(path.stat().st_mtime == 1 for path in kept.values()), "what is there stays as it is"
    assert run(photographs, tmp_path, model, resume=True).already_written == 2


def test_self_ensemble_is_not_mixed_with_images_made_without_it(restored, model, photographs, tmp_path):
    shutil.copytree(restored, tmp_path / "plain")
    with pytest.raises(StorageError, match="its images were made without self_ensemble"):
        run(photographs, tmp_path / "plain", model, resume=True, self_ensemble=True)
    assert below(tmp_path / "plain").keys() == below(restored).keys()

    # The mean of the eight views, and a mark beside the images.
    target = tmp_path / "mean"
    assert run(photographs, target, model, self_ensemble=True).written == 2
    assert below(target).keys() == {"photo_0.png", "photo_1.png", SELF_ENSEMBLE_FILE}
    hazy = to_tensor(decode_image((photographs / "photo_0.png").read_bytes()))
    network = model.build().eval()
    scene = to_image(restore_by_self_ensemble(lambda view: restore(network, view), hazy).scene)
    written = decode_image((target / "photo_0.png").read_bytes()).astype(int)
    assert np.abs(written - scene).max() <= 1
    assert np.abs(written - expected(model, photographs / "photo_0.png")).max() > 1

    # The finished folder is done for the same job only.
    assert run(photographs, target, model, resume=True, self_ensemble=True).already_written == 2
    with pytest.raises(StorageError, match="its images were made with self_ensemble; another output"):
        run(photographs, target, model, resume=True)


def test_a_job_of_this_kind_tells_what_it_did(job_run):
    folder, said = job_run
    assert "image 2/2" in said and "2 images written" in said and "images/s" in said
    assert len(below(folder)) == 2


def test_large_images_are_cut_and_come_out_the_same(local_ray, model, tmp_path):
    write_image(tmp_path / "in" / "large.png", photograph(np.random.default_rng(0), 420, 520))
    run(tmp_path / "in", tmp_path / "cut", model, memory_mib=72)
    cut = decode_image((tmp_path / "cut" / "large.png").read_bytes()).astype(int)
    difference = np.abs(cut - expected(model, tmp_path / "in" / "large.png"))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "png"}, "a.jpg and a.png would both become a.png"),
        ({"transmission": True}, r"a.jpg and a.png would both become a.\*.png"),
    ],
)
def test_two_images_that_would_become_one_are_refused(local_ray, model, tmp_path, options, told):
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / "in" / name, photograph(np.random.default_rng(0), 32, 32))
    with pytest.raises(StorageError, match=told):
        run(tmp_path / "in", tmp_path / "out", model, **options)


def test_a_network_is_not_asked_for_what_it_has_not(local_ray, dataset, tmp_path):
    nafnet = Model(
        NetworkSpec("NAFNet", {"width": 4, "middle_blk_num": 1, "enc_blk_nums": [1], "dec_blk_nums": [1]}), None, {}
    )
    with pytest.raises(ModelSourceError, match="NAFNet has no stages; only corun has"):
        run(dataset / "hazy", tmp_path, nafnet, stages=True)
    with pytest.raises(ModelSourceError, match="transmission: NAFNet gives none"):
        run(dataset / "hazy", tmp_path, nafnet, transmission=True)


def test_a_store_that_does_not_take_the_images_is_one_error_not_many_bad_images(
    local_ray, photographs, model, tmp_path
):
    (tmp_path / "file").write_text("where a folder is needed")
    with pytest.raises(StorageError, match=r"cannot write \S+/file/out/\S+: "):
        run(photographs, tmp_path / "file" / "out", model)
