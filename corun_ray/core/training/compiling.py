"""torch.compile as this project uses it."""

from typing import cast

import torch
from torch import nn

from corun_ray.core.networks.corun import CORUN


def compiled(network: nn.Module) -> nn.Module:
    """The same network, compiled at its first call and again for other sizes; CORUN as one graph without a break.

    Raises torch's own errors at the first call where the network cannot be compiled.
    """
    # Left to itself, torch 2.14 turns what enters the backward pass of a depthwise convolution into another layout.
    layout = {"force_layout_optimization": True}
    return cast(nn.Module, torch.compile(network, fullgraph=isinstance(network, CORUN), options={**layout}))
