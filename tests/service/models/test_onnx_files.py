"""A model as an ONNX file: onnxruntime gives what torch gives, at any size, and what cannot be exported is refused."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.networks.build import build_network
from corun_ray.core.networks.corun import CORUN, Restoration, update_scene, update_transmission
from corun_ray.core.networks.cpmm import Block, Resample
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoints import LoadedNetwork, save_model
from corun_ray.service.models import onnx_files
from corun_ray.service.models.onnx_files import DESCRIPTION_FILE, METADATA_KEY, ONNX_FILE, OnnxError, save_onnx
from corun_ray.service.models.sources import ModelSourceError, fetch_model, pull_model
from tests import ROOT
from tests.conftest import photograph, write_image

TOLERANCE = 1e-5
"""Sums of float32 in another order: some hundred products of numbers up to 1, each rounded at 6e-8."""
SHAPES = ((1, 3, 16, 16), (1, 3, 61, 100), (2, 3, 48, 32))
NAFNET = NetworkSpec("NAFNet", {"width": 4, "middle_blk_num": 1, "enc_blk_nums": [], "dec_blk_nums": []})


def fill(network: nn.Module) -> nn.Module:
    """Random weights that make every layer count."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


class PartsOfCORUN(nn.Module):
    """Both closed-form steps, one block of two heads, and a way down and up: what a CPMM repeats, in fewer seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(4, 4, 3, padding=1)
        self.block = Block(4, 2)
        self.down, self.up = Resample(4, 2, nn.PixelUnshuffle(2)), Resample(8, 12, nn.PixelShuffle(2))
        self.weight = nn.Parameter(torch.tensor([0.6]))

    def forward(self, hazy: Tensor) -> Restoration:
        transmission = update_transmission(hazy, torch.full_like(hazy[:, :1], 0.5), hazy, self.weight)
        scene = update_scene(hazy, hazy, transmission, self.weight)
        features = self.embedding(torch.cat([scene, transmission], 1).contiguous(memory_format=torch.channels_last))
        return Restoration(scene + self.up(self.down(self.block(features))), transmission)


class KnowsItsSize(nn.Module):
    """Adds a picture of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.zeros(1, 3, 80, 64))

    def forward(self, hazy: Tensor) -> Tensor:
        return hazy + self.picture


class LooksAtItsPixels(nn.Module):
    """Goes another way for bright images, which a graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, hazy: Tensor) -> Tensor:
        return hazy * self.gain if hazy.mean() > 0.5 else hazy


def assert_equal_to_torch(file: Path, network: nn.Module) -> None:
    session = onnxruntime.InferenceSession(file)
    for shape in SHAPES:
        hazy = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))
        expected = [image.numpy() for image in restore(network, hazy) if image is not None]
        found = session.run(None, {"hazy": hazy.numpy()})
        assert len(found) == len(expected)
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE)
        assert np.abs(expected[0] - hazy.numpy()).max() > 0.01


def test_onnxruntime_gives_scene_and_transmission_of_torch_at_any_size(tmp_path: Path) -> None:
    network = fill(PartsOfCORUN())
    save_onnx(tmp_path, network, NetworkSpec("mine:Net", {}))
    assert_equal_to_torch(tmp_path / ONNX_FILE, network)

    model = onnx.load(tmp_path / ONNX_FILE)
    sizes = {}
    for images in [*model.graph.input, *model.graph.output]:
        sizes[images.name] = [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim]
    free = {"hazy": 3, "scene": 3, "transmission": 1}
    assert sizes == {name: ["batch", channels, "height", "width"] for name, channels in free.items()}

    # The description is beside the file and in the file, and nothing in it tells of the machine.
    described = json.loads((tmp_path / DESCRIPTION_FILE).read_text())
    assert json.loads(onnxruntime.InferenceSession(tmp_path / ONNX_FILE).get_modelmeta().custom_metadata_map[
        METADATA_KEY
    ]) == described  # fmt: skip
    assert described["opset"] == 20 == model.opset_import[0].version
    assert described["outputs"].keys() == described["largest_difference_from_torch"].keys() == free.keys() - {"hazy"}
    assert "multiples of 16 px" in described["inside"]
    content = (tmp_path / ONNX_FILE).read_bytes()
    assert str(ROOT).encode() not in content and b"site-packages" not in content


def test_a_pulled_network_of_spandrel_restores_a_photograph_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = fill(build_network(NAFNET))
    (tmp_path / "nafnet").mkdir()
    save_model(tmp_path / "nafnet", LoadedNetwork(network, NAFNET))
    files = pull_model(str(tmp_path / "nafnet"), tmp_path / "DIR", "", file_format="onnx")
    assert [path.name for path in files] == [DESCRIPTION_FILE, ONNX_FILE]
    assert (tmp_path / "DIR").stat().st_mode == tmp_path.joinpath("nafnet").stat().st_mode

    # Run the lines of the page.
    page = (ROOT / "docs" / "models.md").read_text()
    block = re.search(r"(?:^    .*\n)*^    session = onnxruntime.*\n(?:^    .*\n)*", page, re.M)
    assert block is not None
    write_image(tmp_path / "hazy.jpg", photograph(np.random.default_rng(0), 45, 70))
    monkeypatch.chdir(tmp_path)
    exec(re.sub("^    ", "", block[0], flags=re.M), {})

    hazy = to_tensor(decode_image((tmp_path / "hazy.jpg").read_bytes()))
    clear = cv2.imread(str(tmp_path / "clear.png"))[..., ::-1].astype(int)
    assert np.abs(clear - to_image(restore(network, hazy).scene)).max() <= 1


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (KnowsItsSize(), "its graph works for some sizes only, not for a batch of 1, 100 x 61 px"),
        (LooksAtItsPixels(), "its graph cannot be exported to ONNX"),
    ],
    ids=["size", "pixels"],
)
def test_a_network_that_cannot_be_exported_is_one_line_and_no_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], network: nn.Module, told: str
) -> None:
    with pytest.raises(OnnxError, match=told) as refused:
        save_onnx(tmp_path, network.eval(), NetworkSpec("mine:Net", {}))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert capfd.readouterr() == ("", "")
    assert not any(tmp_path.iterdir())


def test_a_failed_export_leaves_no_folder_and_names_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "MAX_WEIGHT_BYTES", 1_000_000)
    with pytest.raises(ModelSourceError, match=r"corun-small: its weights of 0.0 GB do not fit into one ONNX file"):
        pull_model("corun-small", tmp_path / "out", "", file_format="onnx")

    with pytest.raises(ModelSourceError, match="--half: not with --format onnx"):
        pull_model("corun-small", tmp_path / "out", "", half=True, file_format="onnx")

    monkeypatch.setattr(onnx_files, "PACKAGES", ("onnx", "not_installed"))
    with pytest.raises(OnnxError, match=r"needs not_installed, .*: pip install 'corun-ray\[onnx\]'"):
        pull_model("corun-small", tmp_path / "out", "", file_format="onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 4])
def test_whole_networks_of_corun(tmp_path: Path, stages: int) -> None:
    model = fetch_model("corun-small", "")
    spec = NetworkSpec("corun", {"stages": stages, "width": 8 if stages == 2 else 4})
    network = model.build().eval() if stages == 2 else fill(CORUN(4, 4))
    save_onnx(tmp_path, network, spec)
    assert_equal_to_torch(tmp_path / ONNX_FILE, network)
