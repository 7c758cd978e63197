"""The unfolding network: against reference outputs, against its closed form, and how it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corun_ray.core.networks import corun
from corun_ray.core.networks.corun import (
    CORUN,
    Restoration,
    restore_by_closed_form,
    start_as_published,
    update_transmission,
)
from corun_ray.core.networks.cpmm import CPMM
from corun_ray.core.training.checkpoints import load_network
from tests.core.golden import golden_outputs, golden_shapes, golden_state_dict


class Golden(NamedTuple):
    network: CORUN
    expected: dict[str, np.ndarray]
    stages: list[Restoration]
    loss: Tensor


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """The reference weights, read from a file of the published format, run forward and backward once."""
    path: Path = tmp_path_factory.mktemp("golden") / "published.pth"
    weights = golden_state_dict(golden_shapes(2))
    torch.save({"params": {name: torch.zeros_like(w) for name, w in weights.items()}, "params_ema": weights}, path)
    network, expected = cast(CORUN, load_network(path).network), golden_outputs()
    stages = list(network.unfold(torch.from_numpy(expected["input"])))
    scene, transmission = stages[-1]
    loss = (scene.clamp(0, 1) * torch.linspace(0, 1, scene.shape[-1])).mean() + transmission.mean()
    loss.backward()
    return Golden(network, expected, stages, loss)


@pytest.mark.parametrize("stages", [2, 4])
def test_names_and_shapes_are_the_published_ones(stages: int) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in CORUN(stages).state_dict().items()}
    assert ours == golden_shapes(stages)


@pytest.mark.parametrize("stage", [1, 2])
def test_every_stage_matches_the_reference(golden: Golden, stage: int) -> None:
    restoration = golden.stages[stage - 1]
    for name in ("scene", "transmission"):
        ours = getattr(restoration, name).detach().numpy()
        np.testing.assert_allclose(ours, golden.expected[f"{name}_{stage}"], rtol=0, atol=1e-4)


def test_loss_and_every_gradient_match_the_reference(golden: Golden) -> None:
    assert golden.loss.item() == pytest.approx(float(golden.expected["loss"]), rel=1e-4)
    ours = {name: p.grad.norm().item() for name, p in golden.network.named_parameters() if p.grad is not None}
    reference = dict(zip(golden.expected["grad_names"].tolist(), golden.expected["grad_norms"].tolist(), strict=True))
    assert ours.keys() == reference.keys() and len(reference) == 310
    assert ours == pytest.approx(reference, rel=1e-3)


def test_forward_is_the_last_stage(golden: Golden) -> None:
    with torch.no_grad():
        scene, transmission = golden.network(torch.from_numpy(golden.expected["input"]))
    torch.testing.assert_close(scene, golden.stages[-1].scene)
    torch.testing.assert_close(transmission, golden.stages[-1].transmission)


def test_half_precision_keeps_the_closed_form_in_float32(golden: Golden) -> None:
    hazy = torch.from_numpy(golden.expected["input"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scene, transmission = golden.network(hazy)
    assert transmission.dtype == torch.float32
    # bfloat16 keeps 8 bits, so most values must differ a little and none much.
    for ours, exact in ((scene, golden.stages[-1].scene), (transmission, golden.stages[-1].transmission)):
        difference = (ours.float() - exact).abs()
        assert 0 < difference.mean() < 0.01 and difference.max() < 0.1


class TypesOfOperations(TorchDispatchMode):
    """Notes the types of tensors that operations read and make, in the closed-form steps and in convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closed_form = False
        self.closed_form: dict[str, set[torch.dtype]] = {}
        self.convolutions: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = {leaf.dtype for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if self.is_closed_form:
            self.closed_form.setdefault(func.__name__, set()).update(found - {torch.bool})
        elif "convolution" in str(func):
            self.convolutions |= found
        return result

    def watch(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a closed-form step whose operations are told from others."""

        def run(*inputs: Tensor) -> Tensor:
            self.is_closed_form = True
            result = step(*inputs)
            self.is_closed_form = False
            return result

        return run


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operation_of_the_closed_form_is_in_float32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory, which may stand for a GPU's: its autocast has other rules than a CPU's."""
    operations = TypesOfOperations()
    for name in ("update_transmission", "update_scene"):
        monkeypatch.setattr(corun, name, operations.watch(getattr(corun, name)))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)

    with FakeTensorMode(), torch.device(device), torch.autocast(device, torch.bfloat16):
        network, hazy = CORUN(3, 4), torch.rand(2, 3, 16, 16)
        with operations:
            stages = list(network.unfold(hazy))
    assert operations.convolutions == {torch.bfloat16}, "the learned half is in half precision"
    assert {"div.Tensor", "sum.dim_IntList", "reciprocal.default", "clamp.default"} <= operations.closed_form.keys()
    assert set().union(*operations.closed_form.values()) == {torch.float32}, operations.closed_form
    # The learned corrections are added in float32 too, so no stage rounds what it hands on.
    for scene, transmission in stages:
        assert transmission is not None and scene.dtype == transmission.dtype == torch.float32


def test_half_precision_hardly_moves_the_closed_form(golden: Golden) -> None:
    network = CORUN(2)
    network.load_state_dict(golden.network.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        stages = list(network.unfold(torch.from_numpy(golden.expected["input"])))
    scene, transmission = stages[-1]
    assert transmission is not None
    loss = (scene.clamp(0, 1) * torch.linspace(0, 1, scene.shape[-1])).mean() + transmission.mean()
    loss.backward()

    # The first T is the closed form alone; what follows has the learned corrections' rounding.
    for number, (ours, exact) in enumerate(zip(stages, golden.stages, strict=True)):
        assert ours.transmission is not None and exact.transmission is not None
        bound = 0 if number == 0 else 2e-3
        torch.testing.assert_close(ours.transmission, exact.transmission, rtol=0, atol=bound)
        torch.testing.assert_close(ours.scene, exact.scene, rtol=0, atol=2e-3)
    # The gradients of the closed-form steps' own weights are those of the reference, too.
    reference = dict(zip(golden.expected["grad_names"].tolist(), golden.expected["grad_norms"].tolist(), strict=True))
    weights = {name: one.grad for name, one in network.named_parameters() if name.endswith("step_lambda")}
    assert len(weights) == 4
    for name, gradient in weights.items():
        assert gradient is not None and gradient.dtype == torch.float32
        assert gradient.norm().item() == pytest.approx(reference[name], rel=3e-3), name


def exact_transmission(hazy: np.ndarray, transmission: np.ndarray, scene: np.ndarray, weight: float) -> np.ndarray:
    """The equation of the transmission step in float64; `scene` is the closed-form one of the stage before."""
    gap = 1 - scene
    safe_gap = np.where(gap == 0, 1e-7, gap)
    below = np.sum(gap + weight / safe_gap, axis=1, keepdims=True)
    above = np.sum(1 - hazy + weight * transmission / safe_gap, axis=1, keepdims=True)
    return np.clip(above / np.where(below == 0, 1e-7, below), 0.05, 0.999)


def exact_scene(hazy: np.ndarray, scene: np.ndarray, transmission: np.ndarray, weight: float) -> np.ndarray:
    """The equation of the scene step in float64."""
    above = transmission * hazy + transmission**2 - transmission + weight * scene
    return np.clip(above / (transmission**2 + weight), 0, 1)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_fresh_network_is_the_closed_form(stages: int) -> None:
    hazy = np.random.default_rng(0).uniform(0, 1, (2, 3, 16, 24))
    hazy[0, :, :4] = 1  # pure airlight: zero denominators
    hazy[0, :, 4:8] = 0
    hazy[1, 0, :4] = 1
    with torch.no_grad():
        ours = list(CORUN(stages, width=4).unfold(torch.from_numpy(hazy).float()))
    assert len(ours) == stages
    weight = 1 / (1 + np.exp(-0.3))
    scene, transmission = hazy, np.full_like(hazy[:, :1], 0.5)
    for restoration in ours:
        transmission = exact_transmission(hazy, transmission, scene, weight)
        scene = exact_scene(hazy, scene, transmission, weight)
        np.testing.assert_allclose(restoration.transmission, transmission, rtol=0, atol=1e-5)
        np.testing.assert_allclose(restoration.scene, scene, rtol=0, atol=1e-5)
    alone = restore_by_closed_form(torch.from_numpy(hazy).float(), stages)
    torch.testing.assert_close(alone.scene, ours[-1].scene, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone.transmission, ours[-1].transmission, rtol=0, atol=1e-6)


def test_the_published_start_is_random() -> None:
    torch.manual_seed(0)
    network = CORUN(2, width=16)
    start_as_published(network)

    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    weights = torch.cat([module.weight.detach().flatten() for module in linear])
    assert weights.mean() == pytest.approx(0, abs=1e-3) and weights.std() == pytest.approx(0.02, rel=0.02)
    assert all(module.bias is None or not module.bias.any() for module in linear)

    # The last convolution of a CPMM is uniform within torch's bound, 1 / sqrt(inputs of a value).
    mappings = [module.mapping.weight for module in network.modules() if isinstance(module, CPMM)]
    for weight in mappings:
        assert 0.9 * (16 * 9) ** -0.5 < weight.abs().max() <= (16 * 9) ** -0.5

    hazy = torch.rand(1, 3, 32, 32)
    assert (network(hazy).scene - restore_by_closed_form(hazy, 2).scene).abs().max() > 0.01


def test_every_step_takes_its_part_of_the_state_before() -> None:
    """Learned and closed-form scene, learned and closed-form transmission differ from the second stage on."""
    torch.manual_seed(0)
    network = CORUN(3, width=4)
    stages: list[Any] = [network.first, network.basic[0], network.last]
    for number, stage in enumerate(stages):
        for cpmm in (stage.trans_net, stage.dehaze_net) if number < 2 else (stage.dehaze_net,):
            torch.nn.init.normal_(cpmm.mapping.weight, std=0.02)
        stage.trans_prox.step_lambda.data.fill_(0.3 + 0.1 * number)
        stage.dehaze_prox.step_lambda.data.fill_(0.9 - 0.1 * number)

    def learned(cpmm: torch.nn.Module, estimate: np.ndarray, partner: np.ndarray) -> np.ndarray:
        return cpmm(torch.from_numpy(estimate).float(), torch.from_numpy(partner).float()).double().numpy()

    hazy = np.random.default_rng(0).uniform(0.2, 0.8, (1, 3, 16, 16))
    scene = scene_estimate = hazy
    transmission = np.full_like(hazy[:, :1], 0.5)
    with torch.no_grad():
        for number, (stage, ours) in enumerate(
            zip(stages, network.unfold(torch.from_numpy(hazy).float()), strict=True)
        ):
            estimate = exact_transmission(hazy, transmission, scene_estimate, 0.3 + 0.1 * number)
            transmission = learned(stage.trans_net, estimate, scene) if number < 2 else estimate
            scene_estimate = exact_scene(hazy, scene, estimate, 0.9 - 0.1 * number)
            scene = learned(stage.dehaze_net, scene_estimate, estimate)
            np.testing.assert_allclose(ours.transmission, estimate, rtol=0, atol=1e-5)
            np.testing.assert_allclose(ours.scene, scene, rtol=0, atol=1e-5)
            assert min(np.abs(scene - scene_estimate).max(), np.abs(scene - hazy).max()) > 1e-3


def test_transmission_stays_within_its_bounds() -> None:
    bright, dark, weight = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1), torch.tensor([0.5])
    low, high = torch.full((1, 1, 1, 1), 0.05), torch.ones(1, 1, 1, 1)
    assert update_transmission(bright, low, dark, weight).item() == pytest.approx(0.05)
    assert update_transmission(dark, high, dark, weight).item() == pytest.approx(0.999)


def test_pure_airlight_has_a_finite_gradient() -> None:
    network = CORUN(2, width=4)
    scene, transmission = network(torch.ones(1, 3, 8, 8))
    (scene.mean() + transmission.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_gradients_reach_every_parameter_once_the_output_layers_have_moved() -> None:
    torch.manual_seed(0)
    network = CORUN(3, width=4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    hazy, clear = torch.rand(2, 2, 3, 16, 16)
    for _ in range(2):
        optimizer.zero_grad()
        scene, transmission = network(hazy)
        ((scene - clear).abs().mean() + transmission.mean()).backward()
        optimizer.step()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


def test_images_of_a_batch_do_not_mix() -> None:
    torch.manual_seed(0)
    network = CORUN(2, width=4)
    for cpmm in (network.first.trans_net, network.first.dehaze_net, network.last.dehaze_net):
        torch.nn.init.normal_(cpmm.mapping.weight, std=0.1)
    hazy = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        together = network(hazy)
        alone = network(hazy[1:])
    torch.testing.assert_close(together.scene[1:], alone.scene, rtol=0, atol=1e-5)


def test_activations_computed_again_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kept, again = CORUN(3, width=4), CORUN(3, width=4, checkpoint_activations=True)
    for parameter in kept.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert again.load_state_dict(kept.state_dict()) and list(again.state_dict()) == list(kept.state_dict())
    calls = []
    forward = CPMM.forward
    monkeypatch.setattr(CPMM, "forward", lambda self, *inputs: calls.append(0) or forward(self, *inputs))

    def run(network: CORUN) -> tuple[Restoration, dict[str, Tensor | None], int]:
        calls.clear()
        scene, transmission = network(torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)))
        (scene.square().mean() + transmission.mean()).backward()
        return Restoration(scene, transmission), {name: p.grad for name, p in network.named_parameters()}, len(calls)

    expected, gradients, once = run(kept)
    outputs, same_gradients, twice = run(again)
    assert (once, twice) == (5, 10)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-5, atol=1e-7)
    assert run(again.eval())[2] == 5, "only training recomputes"


@pytest.mark.parametrize(("stages", "width"), [(1, 30), (0, 30), (4, 31), (4, 0)])
def test_impossible_networks_are_refused(stages: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{stages} stages, width {width}: at least 2 stages and an even width"):
        CORUN(stages, width)


def test_large_images_take_the_closed_form_steps_in_bands_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = CORUN(2, 4).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hazy = torch.rand(1, 3, 40, 24)
    with torch.no_grad():
        whole = network(hazy)
        monkeypatch.setattr(corun, "BAND_ROWS", 16)
        bands = network(hazy)
    assert torch.equal(bands.scene, whole.scene) and torch.equal(bands.transmission, whole.transmission)
