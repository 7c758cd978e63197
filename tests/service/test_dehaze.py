"""Batch dehazing by Ray Data, with a network that no training has touched."""

import numpy as np
import pytest
import torch

from corun_ray.core.corun import CORUN
from corun_ray.core.images import decode_image
from corun_ray.core.networks import NetworkSpec
from corun_ray.core.restore import restore, to_image, to_tensor
from corun_ray.service.dehaze import dehaze
from corun_ray.service.models import Model, ModelSourceError
from corun_ray.service.storage import StorageError
from tests.conftest import photograph, write_image


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CORUN(2, 4).eval()


@pytest.fixture(scope="module")
def model(network):
    return Model(NetworkSpec("corun", {"stages": 2, "width": 4}), network.state_dict(), {})


def test_dehazing_keeps_names_folders_and_sizes_and_names_what_it_leaves_out(local_ray, model, tmp_path):
    rng = np.random.default_rng(2)
    source, target = tmp_path / "in", tmp_path / "out"
    shapes = {"a.png": (40, 64), "deep/b.jpg": (33, 47), "c.png": (90, 16)}
    for name, shape in shapes.items():
        write_image(source / name, photograph(rng, *shape))
    (source / "broken.png").write_text("no picture")
    write_image(source / "tiny.png", photograph(rng, 12, 40))
    result = dehaze(str(source), str(target), model)
    assert result.written == 3
    assert result.bad_files[str(source / "broken.png")].startswith("not an image")
    assert "too small" in result.bad_files[str(source / "tiny.png")]
    written = {str(p.relative_to(target)): decode_image(p.read_bytes()) for p in target.rglob("*.png")}
    assert {name: image.shape[:2] for name, image in written.items()} == {
        "a.png": (40, 64),
        "deep/b.png": (33, 47),
        "c.png": (90, 16),
    }
    image = decode_image((source / "a.png").read_bytes())
    expected = to_image(restore(model.build().eval(), to_tensor(image)).scene)
    assert np.abs(written["a.png"].astype(int) - expected).max() <= 1


def test_two_images_that_would_become_one_are_refused(local_ray, model, tmp_path):
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / "in" / name, photograph(np.random.default_rng(0), 32, 32))
    with pytest.raises(StorageError, match="a.jpg and a.png would both become a.png"):
        dehaze(str(tmp_path / "in"), str(tmp_path / "out"), model)


def test_stage_pictures_show_each_stage_and_leave_the_result_as_it_is(local_ray, dataset, model, tmp_path):
    plain, staged = tmp_path / "plain", tmp_path / "staged"
    dehaze(str(dataset / "hazy"), str(plain), model)
    assert dehaze(str(dataset / "hazy"), str(staged), model, with_stages=True).written == 6
    for name in sorted(path.name for path in plain.iterdir()):
        assert (plain / name).read_bytes() == (staged / name).read_bytes()
        picture = decode_image((staged / name.replace(".png", ".stages.png")).read_bytes())
        # The hazy image and two stages below each other; scene, transmission, re-hazed and its error side by side.
        assert picture.shape[0] > 3 * 200 and picture.shape[1] > 4 * 320 and picture.std() > 20
    with pytest.raises(ModelSourceError, match="NAFNet has no stages; only corun has"):
        dehaze(str(dataset / "hazy"), str(staged), Model(NetworkSpec("NAFNet", {}), None, {}), with_stages=True)


def test_a_store_that_does_not_take_the_images_is_one_error_not_many_bad_images(local_ray, dataset, model, tmp_path):
    (tmp_path / "file").write_text("where a folder is needed")
    with pytest.raises(StorageError, match=r"cannot write \S+/file/out/\S+\.png: "):
        dehaze(str(dataset / "hazy"), str(tmp_path / "file" / "out"), model)
