"""What torch.compile makes of the network; slow, since a first compilation takes minutes."""

import pytest
import torch
from torch import nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.acceleration import compile_network


@pytest.mark.slow
def test_the_compiled_network_trains_as_the_eager_one():
    torch.manual_seed(0)
    network = CORUN(2, 4)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    hazy = torch.rand(1, 3, 64, 64)
    gradients = []
    for form in (network, compile_network(network)):
        network.zero_grad()
        scene, transmission = form(hazy)
        (scene.square().mean() + transmission.mean()).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_a_network_that_is_not_ours_may_break_the_graph():
    class Printing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            print("here")
            return images * 2

    assert torch.equal(compile_network(Printing())(torch.ones(2)), torch.full((2,), 2.0))
