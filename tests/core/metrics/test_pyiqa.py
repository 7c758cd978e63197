"""pyiqa's metrics as scorers.

`data/iqa` holds the parameters of two metrics as their authors at LIVE, The University of Texas at Austin,
released them: BRISQUE's support vector machine (`allmodel`, a libsvm text, here as arrays) and NIQE's model of
pristine images (`modelparameters.mat`).
"""

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corun_ray.core.metrics.pyiqa import build_metric, keep_pyiqa_offline
from corun_ray.core.scoring.quality import IqaScorer, load_quality, probe_scorer
from corun_ray.core.weights import WeightsError, WeightsSource
from tests import DATA

BRISQUE_FILE = "brisque_svm_weights.pth"
NIQE_FILE = "niqe_modelparameters.mat"
MUSIQ_FILE = "musiq_koniq_ckpt-e95806b9.pth"
NIMA_FILE = "NIMA_VGG16_ava-dc4e8265.pth"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def folder(path: Path) -> WeightsSource:
    def find(name: str) -> Path:
        if not (path / name).is_file():
            raise WeightsError(f"{path / name}: no such file")
        return path / name

    return find


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> WeightsSource:
    """The real parameters, in the formats that pyiqa expects."""
    path = tmp_path_factory.mktemp("real")
    with np.load(DATA / "iqa" / "brisque_svm.npz") as svm:
        torch.save((torch.from_numpy(svm["sv_coef"]), torch.from_numpy(svm["sv"])), path / BRISQUE_FILE)
    shutil.copy(DATA / "iqa" / NIQE_FILE, path)
    return folder(path)


def photographs(side_px: int = 288) -> Tensor:
    """Crops of real photographs, `3 3 side side`."""
    crops = []
    for name in ("test_image2.JPG", "lhd_4.png", "gfn_marble.png"):
        pixels = cv2.imread(str(DATA / "fade" / name))
        assert pixels is not None, name
        crops.append(torch.from_numpy(pixels[-side_px:, :side_px, ::-1].copy()).permute(2, 0, 1) / 255)
    return torch.stack(crops)


def noise(side_px: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(3))


def add_noise(images: Tensor) -> Tensor:
    return (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def blur(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 7, 1, 3)


@pytest.mark.parametrize("name", ["brisque", "niqe"])
@pytest.mark.parametrize("spoil", [add_noise, blur])
def test_spoiled_photographs_rate_lower(name: str, spoil: Callable[[Tensor], Tensor], real: WeightsSource) -> None:
    quality = load_quality(name, real)
    clean, spoiled = quality(photographs()), quality(spoil(photographs()))
    assert clean.shape == (3,) and clean.dtype == torch.float32
    assert ((spoiled > 0) & (spoiled < clean - 0.01) & (clean < 1)).all(), (clean, spoiled)


def test_the_support_vectors_are_those_of_pyiqas_brisque(real: WeightsSource) -> None:
    """The parameters that are not in the file are constants of pyiqa's code, and fit the released machine."""
    metric: Any = build_metric("brisque", lambda url: real(Path(url).name)).net
    with np.load(DATA / "iqa" / "brisque_svm.npz") as svm:
        assert (metric.gamma, metric.rho) == (svm["gamma"], svm["rho"])
    assert metric.sv.shape == (774, 36)
    # Features were scaled to [-1, 1] over the training images before they became support vectors.
    assert metric.sv.amin(0).tolist() == pytest.approx([-1] * 36, abs=0.2)
    assert metric.sv.abs().max() <= 1
    # In an epsilon-SVR the multipliers add up to zero.
    assert abs(metric.sv_coef.double().sum()) < 1e-3


@pytest.mark.parametrize(("name", "side_px"), [("brisque", 32), ("brisque", 96), ("niqe", 96), ("niqe", 192)])
def test_an_images_score_depends_neither_on_its_batch_nor_on_the_chunk(
    name: str, side_px: int, real: WeightsSource
) -> None:
    images = torch.cat([photographs(side_px), add_noise(photographs(side_px))])
    quality = load_quality(name, real)
    together = quality.compute_raw(images)
    singles = torch.cat([quality.compute_raw(image[None]) for image in images])
    torch.testing.assert_close(together, singles, rtol=1e-4, atol=0.02)
    torch.testing.assert_close(
        load_quality(name, real, chunk_images=4).compute_raw(images), together, rtol=1e-4, atol=0.02
    )


@pytest.mark.parametrize("name", ["brisque", "niqe"])
def test_flat_images_score_0_and_harm_no_other(name: str, real: WeightsSource) -> None:
    quality = load_quality(name, real)
    images = photographs(96)
    mixed = torch.stack([images[0], torch.full((3, 96, 96), 0.5), images[1]])
    torch.testing.assert_close(quality(mixed)[[0, 2]], quality(images)[:2], rtol=0, atol=1e-4)
    assert quality(mixed)[1] == 0 and quality(mixed[1:2]) == 0


def test_scores_are_computed_in_float32_under_autocast(real: WeightsSource) -> None:
    quality = load_quality("brisque", real)
    expected = quality(photographs(96))
    with torch.autocast("cpu", torch.bfloat16):
        found = quality(photographs(96))
    assert torch.equal(found, expected)


def test_the_range_given_says_worst_then_best(real: WeightsSource) -> None:
    raw = load_quality("brisque", real).compute_raw(photographs())
    given = load_quality("brisque", real, (100.0, 20.0))(photographs())
    torch.testing.assert_close(given, ((100 - raw) / 80).clamp(0, 1))
    beyond = load_quality("brisque", real, (-2.0, -1.0))(photographs())
    assert beyond.tolist() == [1, 1, 1]


def test_a_metric_without_a_range_needs_one(real: WeightsSource) -> None:
    with pytest.raises(ValueError, match=r"score_range: missing \(pyiqa gives pi no range\)"):
        load_quality("pi", real)


@pytest.mark.parametrize("name", ["fid", "lpips", "brisk"])
def test_unknown_metrics_are_refused(name: str, real: WeightsSource) -> None:
    with pytest.raises(ValueError, match=rf"^'{name}' is no metric"):
        load_quality(name, real)


def test_nothing_is_printed(real: WeightsSource, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    load_quality("musiq", folder(save_musiq(tmp_path)))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "file"),
    [("brisque", BRISQUE_FILE), ("niqe", NIQE_FILE), ("musiq", MUSIQ_FILE), ("clipiqa", "RN50.pt")]
    + [("dbcnn", "vgg16-397923af.pth")],
)
def test_missing_weights_are_named(name: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=f"{file}: no such file"):
        load_quality(name, folder(tmp_path))


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(("name", "file"), [("brisque", BRISQUE_FILE), ("musiq", MUSIQ_FILE), ("clipiqa", "RN50.pt")])
def test_code_in_a_weights_file_is_refused_and_not_run(name: str, file: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "extra": Attack(tmp_path / "ran")}, tmp_path / file)
    with pytest.raises(WeightsError, match=f"{name}: pyiqa cannot build it with {file}") as caught:
        load_quality(name, folder(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / file, weights_only=False)
    assert (tmp_path / "ran").exists(), "the attack would not have worked"


def test_torchscript_programs_are_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "RN50.pt"))
    with pytest.raises(WeightsError, match=r"clipiqa: pyiqa cannot build it with RN50\.pt \(.*TorchScript"):
        load_quality("clipiqa", folder(tmp_path))


def ours_elsewhere() -> set[str]:
    """Names in other modules of what the replacing module defines, other than by importing it openly."""
    own = keep_pyiqa_offline.__module__
    return {
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        for name, value in list(getattr(module, "__dict__", {}).items())
        if getattr(value, "__module__", None) == own and not module.__name__.startswith(("corun_ray", "tests"))
    }


def test_everything_is_put_back_after_success_and_failure(real: WeightsSource, tmp_path: Path) -> None:
    import timm.models._builder
    from pyiqa.utils import download_util

    def state() -> list[Any]:
        hub, jit, builder = torch.hub, torch.jit, timm.models._builder
        functions = [hub.download_url_to_file, hub.get_dir, jit.load, builder.load_pretrained]
        return [*functions, download_util.DEFAULT_CACHE_DIR, dict(os.environ), sys.stdout]

    before = state()
    with keep_pyiqa_offline(lambda url: tmp_path):
        assert ours_elsewhere() and state() != before
    load_quality("brisque", real)
    assert state() == before and ours_elsewhere() == set()
    with pytest.raises(WeightsError):
        load_quality("liqe", folder(tmp_path))
    with pytest.raises(WeightsError):
        load_quality("brisque", lambda name: Path("/nowhere"))
    assert state() == before and ours_elsewhere() == set()
    # A module that was first imported while a metric was built:
    assert sys.modules["pyiqa.archs.liqe_arch"].DEFAULT_CACHE_DIR == download_util.DEFAULT_CACHE_DIR
    assert "pkg_resources" not in sys.modules or sys.modules["pkg_resources"].__spec__ is not None


def save_musiq(path: Path) -> Path:
    """A MUSIQ of its true size with random weights."""
    from pyiqa.archs.musiq_arch import MUSIQ

    torch.manual_seed(0)
    torch.save(MUSIQ(pretrained=False).state_dict(), path / MUSIQ_FILE)
    return path


def test_musiq_rates_blocks_and_images(tmp_path: Path) -> None:
    quality = load_quality("musiq", folder(save_musiq(tmp_path)), (-2.0, 2.0))
    assert not any(parameter.requires_grad for parameter in quality.parameters()) and not quality.metric.training
    blocks, images = noise(32, count=4), noise(96)
    for batch in (blocks, images):
        scores = quality(batch)
        assert scores.shape == (len(batch),) and ((scores > 0) & (scores < 1)).all()
        torch.testing.assert_close(quality(batch[1:2]), scores[1:2])
    assert quality.compute_raw(blocks).unique().numel() == 4
    assert not quality(blocks.requires_grad_()).requires_grad


def test_clip_is_found_in_its_list_and_frozen(tmp_path: Path) -> None:
    from pyiqa.archs.clip_model import CLIP

    torch.manual_seed(0)
    vision = {"image_resolution": 64, "vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}
    text = {"context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1}
    state = CLIP(embed_dim=64, **vision, **text, transformer_layers=1).state_dict()
    torch.save(state, tmp_path / "RN50.pt")
    quality = load_quality("clipiqa", folder(tmp_path))
    metric: Any = quality.metric
    hidden = metric.net.clip_model[0]
    assert not any(parameter.requires_grad for parameter in hidden.parameters()) and not hidden.training
    scores = quality(noise(64))
    assert scores.shape == (2,) and ((scores > 0) & (scores < 1)).all()

    state["visual.conv1.weight"][0] = torch.nan
    torch.save(state, tmp_path / "RN50.pt")
    with pytest.raises(WeightsError, match=r"clipiqa: its files hold no values for visual\.conv1\.weight"):
        load_quality("clipiqa", folder(tmp_path))


def test_a_backbone_takes_all_its_weights_from_the_metrics_own_file(tmp_path: Path) -> None:
    from pyiqa.archs.nima_arch import NIMA

    with keep_pyiqa_offline(lambda url: tmp_path):
        state = NIMA(pretrained=False).state_dict()
    backbone = {key for key in state if state[key].isnan().any()}
    assert backbone == {key for key in state if key.startswith("base_model.")}
    generator = torch.Generator().manual_seed(0)
    filled = {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}
    for value in filled.values():
        value *= (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
    torch.save({"params": filled}, tmp_path / NIMA_FILE)
    quality = load_quality("nima-vgg16-ava", folder(tmp_path))
    scores = quality(noise(32))
    assert ((scores > 0.1) & (scores < 1)).all() and scores[0] != scores[1]

    del filled["base_model.features_0.weight"]
    torch.save({"params": filled}, tmp_path / NIMA_FILE)
    with pytest.raises(WeightsError, match=rf"nima-vgg16-ava: .*{NIMA_FILE} .*features_0\.weight"):
        load_quality("nima-vgg16-ava", folder(tmp_path))


class Uncovered(nn.Module):
    """A metric that leaves its backbone to timm."""

    def __init__(self, in_list: bool) -> None:
        super().__init__()
        import timm

        backbone = timm.create_model("resnet18", pretrained=True)
        self.backbone: Any = [backbone] if in_list else backbone


@pytest.mark.parametrize("in_list", [False, True])
def test_a_backbone_without_weights_is_refused(in_list: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyiqa.models.inference_model import DEFAULT_CONFIGS
    from pyiqa.utils.registry import ARCH_REGISTRY

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, "Uncovered", Uncovered)
    options = {"type": "Uncovered", "in_list": in_list}
    monkeypatch.setitem(DEFAULT_CONFIGS, "uncovered", {"metric_opts": options, "metric_mode": "NR"})
    with pytest.raises(WeightsError, match=r"no values for .*conv1\.weight of the backbone ResNet"):
        build_metric("uncovered", lambda url: Path(url))


def test_probe_says_which_sizes_a_metric_cannot_rate(real: WeightsSource) -> None:
    probe_scorer(load_quality("brisque", real), 32, 96)
    niqe = load_quality("niqe", real)
    probe_scorer(niqe, 96, 192)
    with pytest.raises(ValueError, match=r"^niqe cannot rate 32 px images \(.+\)$"):
        probe_scorer(niqe, 96, 32)


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean()


def test_probe_refuses_averages_and_numbers_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match=r"mean cannot rate 32 px images \(1 scores for 2 images\)"):
        probe_scorer(IqaScorer("mean", Mean(), 0.0, 1.0), 32)
    with pytest.raises(ValueError, match=r"^the scorer cannot rate 8 px images \(it gives \[nan, nan\] for two\)"):
        probe_scorer(lambda images: images.mean((1, 2, 3)) * torch.nan, 8)
    probe_scorer(lambda images: images.mean((1, 2, 3)), 8)
