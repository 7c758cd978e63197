"""The network as it is computed against the network as it is written down: same weights, same function."""

import pytest
import torch
from torch import Tensor

from corun_ray.core.networks.corun import CORUN
from tests.core.golden import golden_outputs, golden_shapes, golden_state_dict
from tests.core.networks.plain_corun import PlainCORUN


def both(stages: int, width: int) -> tuple[CORUN, PlainCORUN]:
    """Of the same random weights, none of them zero."""
    torch.manual_seed(stages)
    network, plain = CORUN(stages, width), PlainCORUN(stages, width)
    for name, parameter in network.named_parameters():
        if not name.endswith(("step_lambda", "rescale", "norm.weight")):
            torch.nn.init.normal_(parameter, std=0.5 / parameter[0].numel() ** 0.5)
    plain.load_state_dict(network.state_dict())
    return network, plain


def objective(scene: Tensor, transmission: Tensor) -> Tensor:
    return (scene * torch.linspace(-1, 1, scene.shape[-1])).square().mean() + transmission.mean()


@pytest.mark.parametrize(("stages", "width", "shape"), [(2, 30, (2, 3, 32, 40)), (3, 8, (1, 3, 64, 24))])
def test_outputs_and_gradients_are_those_of_the_plain_form(
    stages: int, width: int, shape: tuple[int, int, int, int]
) -> None:
    network, plain = both(stages, width)
    hazy = torch.rand(shape)
    hazy[0, :, :4] = 1  # pure airlight: zero denominators
    ours, theirs = list(network.unfold(hazy)), plain(hazy)
    for restoration, (scene, transmission) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(restoration.scene, scene, rtol=0, atol=1e-5)
        torch.testing.assert_close(restoration.transmission, transmission, rtol=0, atol=1e-5)
    objective(*ours[-1]).backward()
    objective(*theirs[-1]).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in network.named_parameters():
        wanted = expected[name].grad
        assert parameter.grad is not None and wanted is not None
        difference = (parameter.grad - wanted).norm() / wanted.norm().clamp_min(1e-6)
        assert difference < 1e-3, name


def test_the_plain_form_is_the_reference_s() -> None:
    """Else the speed of ours would be held against something that nobody runs."""
    plain, expected = PlainCORUN(2), golden_outputs()
    plain.load_state_dict(golden_state_dict(golden_shapes(2)))
    with torch.no_grad():
        stages = plain(torch.from_numpy(expected["input"]))
    for number, (scene, transmission) in enumerate(stages, 1):
        torch.testing.assert_close(scene, torch.from_numpy(expected[f"scene_{number}"]), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            transmission, torch.from_numpy(expected[f"transmission_{number}"]), rtol=0, atol=1e-4
        )


def test_no_feature_changes_its_layout() -> None:
    """Every convolution inside a CPMM takes and gives channels-last memory, else it would be copied there and back."""
    network = CORUN(2, 8)
    strange = []

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (*inputs, output)):
            strange.append(module)

    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(look)
    network(torch.rand(2, 3, 32, 24))
    assert len(convolutions) > 100 and not strange


def test_whole_graph_compiles_once_for_all_sizes() -> None:
    """One graph without a break, and no new one for another size (thumbnails, for which convolutions differ, aside)."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    network = CORUN(2, 4).eval()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for height, width in ((208, 216), (232, 208), (216, 240)):
            hazy = torch.rand(1, 3, height, width)
            torch.testing.assert_close(compiled(hazy).scene, network(hazy).scene)
    assert len(graphs) == 1
