"""What torch.compile makes of the network; slow, since a first compilation takes minutes."""

import pytest
import torch
from torch import nn

from corun_ray.core.networks.corun import CORUN, Restoration
from corun_ray.core.training.acceleration import check_compiled, compile_network
from corun_ray.core.training.compilers import CannotCompile


def make_network() -> CORUN:
    """A small network without a weight of zero."""
    torch.manual_seed(0)
    network = CORUN(2, 4)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return network


def test_the_compiled_teacher_restores_as_the_eager_one():
    """Without a gradient torch takes other memory for free: it once wrote over the transmission."""
    network, hazy = make_network(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = network(hazy), compile_network(network)(hazy)
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_compiled_network_that_restores_otherwise_is_refused(wrong):
    network, images = make_network(), torch.rand(1, 3, 16, 16)

    def miscompiled(images: torch.Tensor) -> Restoration:
        restoration = network(images)
        transmission = restoration.transmission.clone()
        transmission[0, 0, 3, 5] += wrong
        return restoration._replace(transmission=transmission)

    check_compiled(network, network, images, "optim.compile")
    with pytest.raises(CannotCompile, match="optim.compile: the compiled network restores otherwise"):
        check_compiled(miscompiled, network, images, "optim.compile")


@pytest.mark.slow
def test_the_compiled_network_trains_as_the_eager_one():
    network, hazy = make_network(), torch.rand(1, 3, 64, 64)
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
