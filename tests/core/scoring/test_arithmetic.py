"""The precision of scorers, and their replay as graphs: what is captured when, and what a graph could not do."""

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corun_ray.core.scoring.arithmetic import (
    MAX_GRAPHS,
    CannotCapture,
    CudaCapture,
    Function,
    Graphs,
)
from corun_ray.core.scoring.daclip import DaClip
from corun_ray.core.scoring.quality import IqaScorer


class TinyTower(nn.Module):
    """Embeds 16 px images in 8 values, by products alone; notes the type of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.GELU(), nn.Linear(8 * 16, 8))
        self.types: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        features = self.layers(images)
        self.types.append(features.dtype)
        return features


class TinyMetric(nn.Module):
    """A network in place of MUSIQ's: images to `B 1`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 1, 16)
        self.types: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        scores = self.head(images).mean((2, 3))
        self.types.append(scores.dtype)
        return scores


@pytest.fixture
def daclip() -> DaClip:
    torch.manual_seed(0)
    return DaClip(TinyTower(), 16, torch.randn(10, 8), chunk_images=4)


@pytest.fixture
def musiq() -> IqaScorer:
    torch.manual_seed(0)
    return IqaScorer("musiq", TinyMetric(), -1.0, 1.0, chunk_images=4)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# --- Precision ---


@pytest.mark.parametrize(
    ("precision", "dtype", "bound"),
    [("auto", "float32", 0), ("fp32", "float32", 0), ("bf16", "bfloat16", 2e-2), ("fp16", "float16", 2e-3)],
)
def test_scorers_compute_in_the_precision_that_is_asked_for(
    precision: Any, dtype: str, bound: float, daclip: DaClip, musiq: IqaScorer, images: Tensor
) -> None:
    exact = daclip.compute_cosines(images), musiq(images)
    daclip.precision = musiq.precision = precision
    # Whatever the network of a training computes in.
    for caller in (torch.bfloat16, None):
        with torch.autocast("cpu", caller, enabled=caller is not None):
            found = daclip.compute_cosines(images), musiq(images)
        for score, expected in zip(found, exact, strict=True):
            assert score.dtype == torch.float32
            torch.testing.assert_close(score, expected, rtol=0, atol=bound)
            assert bound == 0 or not torch.equal(score, expected)
    for network in (daclip.tower, musiq.metric):
        assert network.types[-1] == getattr(torch, dtype)


def test_auto_is_half_precision_of_daclip_on_gpus_alone() -> None:
    with pytest.MonkeyPatch.context() as patched, FakeTensorMode():
        patched.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patched.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        with torch.device("cuda"):
            tower, metric = TinyTower(), TinyMetric()
            scorers = DaClip(tower, 16, torch.randn(10, 8)), IqaScorer("musiq", metric, 0.0, 1.0)
            images = torch.rand(2, 3, 16, 16)
        for scorer in scorers:
            for precision in ("auto", "fp32", "bf16"):
                scorer.precision = precision
                scorer(images)
    assert tower.types == [torch.float16, torch.float32, torch.bfloat16]
    assert metric.types == [torch.float32, torch.float32, torch.bfloat16]


# --- Graphs ---


def capture_by_copy(function: Function, images: Tensor) -> Function:
    """Stands for a capture: works on memory of its own, of the shape that it was made for."""
    given = images.clone()
    CAPTURED.append(tuple(images.shape))

    def replay(images: Tensor) -> Tensor:
        assert images.shape == given.shape and not torch.is_grad_enabled()
        given.copy_(images)
        return function(given)

    return replay


CAPTURED: list[tuple[int, ...]] = []


@pytest.fixture(autouse=True)
def captured() -> Iterator[list[tuple[int, ...]]]:
    CAPTURED.clear()
    yield CAPTURED


def test_a_shape_is_captured_at_its_second_call_and_replayed_with_other_images(
    daclip: DaClip, musiq: IqaScorer, images: Tensor, captured: list[tuple[int, ...]]
) -> None:
    for scorer in (daclip, musiq):
        with torch.no_grad():
            others = [images, images.flip(0), 1 - images]
            expected = [scorer(other) for other in others]
            scorer.use_graphs(capture_by_copy)
            found = [scorer(other) for other in others]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not torch.equal(expected[0], expected[2])
    # Six images are a full chunk of four and a rest of two.
    assert captured == [(4, 3, 16, 16), (2, 3, 16, 16)] * 2


def test_a_gradient_is_never_replayed(daclip: DaClip, images: Tensor, captured: list[tuple[int, ...]]) -> None:
    daclip.use_graphs(capture_by_copy)
    with torch.no_grad():
        for _ in range(3):
            daclip(images)
    captured.clear()
    images.requires_grad_()
    daclip(images).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0 and not captured


def test_graphs_are_limited_and_further_shapes_run_as_they_are(captured: list[tuple[int, ...]]) -> None:
    graphs = Graphs("mean", lambda images: images.mean((1, 2, 3)), capture_by_copy)
    with torch.no_grad():
        for _ in range(3):
            for count in range(1, MAX_GRAPHS + 4):
                images = torch.rand(count, 3, 4, 4)
                assert torch.equal(graphs(images), images.mean((1, 2, 3)))
    assert len(captured) == MAX_GRAPHS


def test_what_cannot_be_captured_is_told_in_one_line() -> None:
    def refuse(function: Function, images: Tensor) -> Function:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    graphs = Graphs("musiq", lambda images: images, refuse)
    graphs(torch.ones(1))
    with pytest.raises(CannotCapture) as caught:
        graphs(torch.ones(1))
    expected = "musiq cannot be replayed as a CUDA graph (operation not permitted when stream is capturing)"
    assert str(caught.value) == expected


class HostTraffic(TorchDispatchMode):
    """Notes every operation that a capture refuses: copies between host and GPU, numbers that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        # A number of the host, such as a mean's divisor, is part of a kernel's arguments.
        numbers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if "local_scalar" in str(func) or (len(devices) > 1 and {one.device.type for one in numbers} != {"cuda"}):
            self.found.append(f"{func} {traceback.extract_stack()[-3].name}")
        return result


def build_musiq() -> tuple[Function, int]:
    from pyiqa.archs.musiq_arch import MUSIQ

    return MUSIQ(pretrained=False).eval().requires_grad_(False), 96


def build_daclip() -> tuple[Function, int]:
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(32, 8, 64, 2, 1, 4.0, output_dim=16)
    return DaClip(tower, 32, torch.rand(10, 16))._compute_chunk, 96


@pytest.mark.parametrize("build", [build_daclip, build_musiq])
def test_nothing_of_a_scorer_passes_between_host_and_gpu(build: Callable[[], tuple[Function, int]]) -> None:
    """On tensors that stand for a GPU's: as a capture runs it, a scorer has kernels alone."""
    device = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patched, FakeTensorMode(), torch.no_grad():
        patched.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        with device:
            function, side_px = build()
            blocks, images = torch.rand(17, 3, 32, 32), torch.rand(1, 3, side_px, side_px)
        for given in (blocks, images):
            with HostTraffic() as traffic, device:
                assert function(given).is_cuda
            assert traffic.found == []


def test_musiq_alone_would_copy_from_the_host() -> None:
    """So the capture has to make its constants on the GPU."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            function, _ = build_musiq()
            blocks = torch.rand(17, 3, 32, 32)
        with HostTraffic() as traffic:
            function(blocks)
    assert traffic.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("build", [build_daclip, build_musiq])
def test_a_gpu_s_graphs_give_the_scorer_s_numbers(build: Callable[[], tuple[Function, int]]) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        function, side_px = build()
    graphs = Graphs("scorer", function, CudaCapture(torch.device("cuda")))
    with torch.no_grad():
        for shape in ((64, 3, 32, 32), (17, 3, 32, 32), (1, 3, side_px, side_px)) * 4:
            images = torch.rand(shape, device="cuda")
            torch.testing.assert_close(graphs(images), function(images), rtol=1e-3, atol=1e-3)
