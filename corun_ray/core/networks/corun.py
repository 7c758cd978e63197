"""CORUN, the cooperative unfolding network: closed-form steps on the scattering model between learned ones.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.1. With the airlight taken as 1, a hazy image is
`P = J T + 1 - T`; every stage takes one proximal gradient step on the transmission T and one on the scene J.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from corun_ray.core.networks.cpmm import CPMM

TRANSMISSION_MIN, TRANSMISSION_MAX = 0.05, 0.999
DENOMINATOR_MIN = 1e-7
START_TRANSMISSION = 0.5
BAND_ROWS = 512


class Restoration(NamedTuple):
    """What one stage, or the whole network, makes of a hazy image."""

    scene: Tensor
    """J, B 3 H W; about [0, 1], not clamped."""
    transmission: Tensor | None
    """T, B 1 H W in (0, 1] (CORUN: the closed-form one, in [0.05, 0.999]); None of a network that has none."""


def as_restoration(output: Any) -> Restoration:
    """What any network returned, a scene or a pair of scene and transmission, as one thing; raises TypeError."""
    if isinstance(output, Tensor):
        return Restoration(output, None)
    if isinstance(output, tuple) and len(output) == 2:
        scene, transmission = output
        if isinstance(scene, Tensor) and isinstance(transmission, Tensor | None):
            return Restoration(scene, transmission)
    found = type(output).__name__
    raise TypeError(f"the network returned {found}; a scene, or a pair of scene and transmission, was expected")


class ProximalStep(nn.Module):
    """The learnable weight of the prior in one closed-form step (lambda for T, gamma for J)."""

    def __init__(self) -> None:
        super().__init__()
        self.step_lambda = nn.Parameter(torch.tensor([0.3]).sigmoid())


def update_transmission(hazy: Tensor, transmission: Tensor, scene_estimate: Tensor, weight: Tensor) -> Tensor:
    """TGDM: the transmission that best explains `hazy` given the scene, held near the previous one.

    `hazy` and `scene_estimate` (the previous closed-form scene) B 3 H W, `transmission` B 1 H W → B 1 H W.
    """
    attenuated = 1 - scene_estimate
    # Of the sums over the channels only this one needs a division in each.
    pull = weight * torch.where(attenuated == 0, DENOMINATOR_MIN, attenuated).reciprocal().sum(1, keepdim=True)
    numerator = (1 - hazy).sum(1, keepdim=True) + pull * transmission
    denominator = attenuated.sum(1, keepdim=True) + pull
    denominator = torch.where(denominator == 0, DENOMINATOR_MIN, denominator)
    return (numerator / denominator).clamp(TRANSMISSION_MIN, TRANSMISSION_MAX)


def update_scene(hazy: Tensor, scene: Tensor, transmission: Tensor, weight: Tensor) -> Tensor:
    """SGDM: the scene that best explains `hazy` given the transmission, held near the previous one; in [0, 1]."""
    squared = transmission * transmission
    return ((transmission * hazy + squared - transmission + weight * scene) / (squared + weight)).clamp(0, 1)


class Stage(nn.Module):
    """One unfolding stage; the last one has no transmission network."""

    def __init__(self, width: int, *, last: bool) -> None:
        super().__init__()
        self.trans_prox = ProximalStep()
        if not last:
            self.trans_net = CPMM(1, width)
        self.dehaze_prox = ProximalStep()
        self.dehaze_net = CPMM(3, width)
        self.last = last

    def forward(
        self, hazy: Tensor, scene: Tensor, scene_estimate: Tensor, transmission: Tensor, *, recompute: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The state (J, closed-form J, T) of the stage before → that of this one, and the closed-form T.

        With `recompute`, the CPMMs' activations are not kept for the backward pass but computed again.
        """
        # The closed-form steps divide by small numbers: float32 also under autocast.
        with torch.autocast(hazy.device.type, enabled=False):
            images = hazy, transmission.float(), scene_estimate
            transmission_estimate = _in_bands(update_transmission, *images, weight=self.trans_prox.step_lambda)
        if self.last:
            transmission = transmission_estimate
        else:
            transmission = _refine(self.trans_net, transmission_estimate, scene, recompute)
        with torch.autocast(hazy.device.type, enabled=False):
            images = hazy, scene.float(), transmission_estimate
            scene_estimate = _in_bands(update_scene, *images, weight=self.dehaze_prox.step_lambda)
        scene = _refine(self.dehaze_net, scene_estimate, transmission_estimate, recompute)
        return scene, scene_estimate, transmission, transmission_estimate


def _in_bands(step: Callable[..., Tensor], *images: Tensor, weight: Tensor) -> Tensor:
    """A closed-form step, which works on each pixel by itself, on some rows at a time where images are large.

    Its several temporaries are as large as the image; in inference they need not be.
    """
    if torch.is_grad_enabled() or images[0].shape[-2] <= BAND_ROWS:
        return step(*images, weight)
    bands = zip(*(image.split(BAND_ROWS, -2) for image in images), strict=True)
    return torch.cat([step(*band, weight) for band in bands], -2)


def _refine(cpmm: nn.Module, estimate: Tensor, partner: Tensor, recompute: bool) -> Tensor:
    if recompute:
        # Nothing in a CPMM is random.
        return checkpoint(cpmm, estimate, partner, use_reentrant=False, preserve_rng_state=False)
    return cpmm(estimate, partner)


class CORUN(nn.Module):
    """The unfolding network of `stages` (at least 2) stages, each a pair of CPMMs of `width` channels."""

    def __init__(self, stages: int = 4, width: int = 30, checkpoint_activations: bool = False) -> None:
        """With `checkpoint_activations` (may be changed later), training needs less memory and more time."""
        super().__init__()
        if stages < 2 or width < 2 or width % 2:
            raise ValueError(f"CORUN of {stages} stages, width {width}: at least 2 stages and an even width expected")
        self.stages, self.width = stages, width
        self.checkpoint_activations = checkpoint_activations
        self.first = Stage(width, last=False)
        if stages > 2:
            self.basic = nn.ModuleList(Stage(width, last=False) for _ in range(stages - 2))
        self.last = Stage(width, last=True)

    def replace_cpmms(self, wrapped: Callable[[CPMM], nn.Module]) -> "CORUN":
        """A copy for inference, each of its CPMMs replaced by what `wrapped` makes of it."""
        network = copy.deepcopy(self).eval()
        network.checkpoint_activations = False
        for stage in (network.first, *getattr(network, "basic", ()), network.last):
            for name, child in list(stage.named_children()):
                if isinstance(child, CPMM):
                    setattr(stage, name, wrapped(child))
        return network

    def unfold(self, hazy: Tensor) -> Iterator[Restoration]:
        """Every stage's scene and closed-form transmission in order; `hazy` B 3 H W, H and W multiples of 8."""
        scene = scene_estimate = hazy
        transmission = torch.full_like(hazy[:, :1], START_TRANSMISSION)
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for stage in (self.first, *getattr(self, "basic", ()), self.last):
            scene, scene_estimate, transmission, transmission_estimate = stage(
                hazy, scene, scene_estimate, transmission, recompute=recompute
            )
            yield Restoration(scene, transmission_estimate)

    def forward(self, hazy: Tensor) -> Restoration:
        """The last stage's restoration of `hazy` (B 3 H W, RGB in [0, 1], H and W multiples of 8)."""
        return deque(self.unfold(hazy), maxlen=1)[0]
