"""CORUN, the cooperative unfolding network: closed-form steps on the scattering model between learned ones.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.1. The scattering model (equation 1 of the paper), with
the airlight taken as 1, explains a hazy image P by a scene J and a transmission T: `P = J T + 1 - T`. CORUN unfolds
proximal gradient descent on this model into stages. Each stage takes one step on T and one on J, and each step helps
the other. `T_hat` and `J_hat` are the estimates in closed form, before a network refines them.
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
START_TRANSMISSION = 0.5

DENOMINATOR_MIN = 1e-7
"""Stands in for a denominator of zero."""

PRIOR_WEIGHT_LOGIT = 0.3
"""The sigmoid of this number is the initial weight of the prior in a closed-form step."""

BAND_ROWS = 512
"""The closed-form steps of inference work on so many rows of an image at a time."""


class Restoration(NamedTuple):
    """The output of one stage, or of the whole network, for a batch of hazy images."""

    scene: Tensor
    """J, `B 3 H W`; about [0, 1], not clamped."""
    transmission: Tensor | None
    """T, `B 1 H W` in (0, 1]; None of a network that has none. CORUN's is `T_hat`, in [0.05, 0.999]."""


def as_restoration(output: Any) -> Restoration:
    """Convert the output of any network to a `Restoration`.

    The output is a scene, or a pair of a scene and a transmission. Raises `TypeError` for anything else.
    """
    if isinstance(output, Tensor):
        return Restoration(output, None)

    if isinstance(output, tuple) and len(output) == 2:
        scene, transmission = output
        if isinstance(scene, Tensor) and isinstance(transmission, Tensor | None):
            return Restoration(scene, transmission)

    found = type(output).__name__
    raise TypeError(f"the network returned {found}; a scene, or a pair of scene and transmission, was expected")


def update_transmission(hazy: Tensor, transmission: Tensor, scene_estimate: Tensor, weight: Tensor) -> Tensor:
    """Take the closed-form transmission step (TGDM, section 3.1).

    The step explains the hazy image P by the previous stage's scene `J_hat`, and keeps near the previous stage's T. Per
    channel, `(P - J_hat T - 1 + T)^2 + lambda (T - T_previous)^2` is least where, with `a = 1 - J_hat`,
    `T (a + lambda / a) = 1 - P + lambda T_previous / a`. One T serves all three channels, so both sides are summed:

        T_hat = sum(1 - P + lambda T_previous / a) / sum(a + lambda / a)

    `hazy` (P) and `scene_estimate` (`J_hat`) are `B 3 H W`, `transmission` (T) is `B 1 H W`, `weight` is lambda.
    Returns `T_hat`, `B 1 H W` in [0.05, 0.999].
    """
    attenuation = 1 - scene_estimate

    # lambda sum(1 / a), a part of both sums. T does not depend on the channel, so one division a channel is enough.
    divisor = torch.where(attenuation == 0, DENOMINATOR_MIN, attenuation)
    pull = weight * divisor.reciprocal().sum(1, keepdim=True)

    # The two sums over the channels.
    numerator = (1 - hazy).sum(1, keepdim=True) + pull * transmission
    denominator = attenuation.sum(1, keepdim=True) + pull

    denominator = torch.where(denominator == 0, DENOMINATOR_MIN, denominator)
    return (numerator / denominator).clamp(TRANSMISSION_MIN, TRANSMISSION_MAX)


def update_scene(hazy: Tensor, scene: Tensor, transmission: Tensor, weight: Tensor) -> Tensor:
    """Take the closed-form scene step (SGDM, section 3.1).

    The step explains the hazy image P by this stage's transmission `T_hat`, and keeps near the previous stage's J:
    `(P - J T_hat - 1 + T_hat)^2 + gamma (J - J_previous)^2` is least at

        J_hat = (T_hat P + T_hat^2 - T_hat + gamma J_previous) / (T_hat^2 + gamma)

    `hazy` (P) and `scene` (J) are `B 3 H W`, `transmission` (`T_hat`) is `B 1 H W`, `weight` is gamma. Returns `J_hat`,
    `B 3 H W` in [0, 1].
    """
    squared = transmission * transmission
    numerator = transmission * hazy + squared - transmission + weight * scene
    return (numerator / (squared + weight)).clamp(0, 1)


def restore_by_closed_form(hazy: Tensor, stages: int = 2) -> Restoration:
    """Restore hazy images by the closed-form steps alone.

    This is what an untrained network of as many stages returns: a baseline that every training should improve on.
    `hazy` is `B 3 H W`, RGB in [0, 1], of any size.
    """
    scene, transmission = hazy, torch.full_like(hazy[:, :1], START_TRANSMISSION)
    weight = torch.tensor([PRIOR_WEIGHT_LOGIT], device=hazy.device).sigmoid()

    for _ in range(stages):
        transmission = _apply_in_bands(update_transmission, hazy, transmission, scene, weight=weight)
        scene = _apply_in_bands(update_scene, hazy, scene, transmission, weight=weight)
    return Restoration(scene, transmission)


class ProximalStep(nn.Module):
    """The learnable weight of the prior in one closed-form step (lambda for T, gamma for J).

    The parameter has one name for both, which is that of the checkpoints in circulation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step_lambda = nn.Parameter(torch.tensor([PRIOR_WEIGHT_LOGIT]).sigmoid())


class Stage(nn.Module):
    """One unfolding stage: a closed-form step and a learned refinement of T, then the same of J.

    The last stage has no transmission network: its T is `T_hat`.
    """

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
        """Turn the previous stage's state into this stage's state.

        The state is `(J, J_hat, T)`: scenes are `B 3 H W`, the transmission is `B 1 H W`. `hazy` is P.
        Returns `(J, J_hat, T, T_hat)` of this stage. With `recompute`, the backward pass computes the CPMMs'
        activations again, instead of keeping them from the forward pass.
        """
        # 1. Transmission step (TGDM): T_hat from P, and from T and J_hat of the previous stage.
        # The closed-form steps divide by small numbers, so they run in float32 also under autocast.
        with torch.autocast(hazy.device.type, enabled=False):
            images = hazy, transmission.float(), scene_estimate
            transmission_estimate = _apply_in_bands(update_transmission, *images, weight=self.trans_prox.step_lambda)

        # 2. Transmission network (T-CPMM): T refines T_hat with the help of the previous stage's J.
        if self.last:
            transmission = transmission_estimate
        else:
            transmission = _refine(self.trans_net, transmission_estimate, scene, recompute)

        # 3. Scene step (SGDM): J_hat from P, this stage's T_hat and the previous stage's J.
        with torch.autocast(hazy.device.type, enabled=False):
            images = hazy, scene.float(), transmission_estimate
            scene_estimate = _apply_in_bands(update_scene, *images, weight=self.dehaze_prox.step_lambda)

        # 4. Scene network (S-CPMM): J refines J_hat with the help of T_hat.
        scene = _refine(self.dehaze_net, scene_estimate, transmission_estimate, recompute)
        return scene, scene_estimate, transmission, transmission_estimate


def _apply_in_bands(step: Callable[..., Tensor], *images: Tensor, weight: Tensor) -> Tensor:
    """Apply a closed-form step to bands of rows.

    Bands are used where images are large and no gradient is needed. A step works on each pixel by itself, so the bands
    give the same result. Its temporaries, several as large as its input, are then no larger than a band. A network that
    is exported has no bands: their number would depend on the size of the image.
    """
    if torch.is_grad_enabled() or torch.compiler.is_exporting() or images[0].shape[-2] <= BAND_ROWS:
        return step(*images, weight)

    bands_by_image = [image.split(BAND_ROWS, -2) for image in images]
    results = []
    for band in zip(*bands_by_image, strict=True):
        results.append(step(*band, weight))
    return torch.cat(results, -2)


def _refine(cpmm: nn.Module, estimate: Tensor, partner: Tensor, recompute: bool) -> Tensor:
    """Refine a closed-form estimate with a CPMM.

    With `recompute`, the CPMM's activations are not kept for the backward pass.
    """
    if recompute:
        # A CPMM draws no random numbers, so there is no random state to restore.
        return checkpoint(cpmm, estimate, partner, use_reentrant=False, preserve_rng_state=False)
    return cpmm(estimate, partner)


class CORUN(nn.Module):
    """The unfolding network of at least 2 stages, each with CPMMs of `width` channels (section 3.1)."""

    def __init__(self, stages: int = 4, width: int = 30, checkpoint_activations: bool = False) -> None:
        """Create the network with fresh weights.

        `checkpoint_activations` saves memory in training and costs time; it may be changed later. Raises `ValueError`
        for fewer than 2 stages, or an odd width.
        """
        super().__init__()
        if stages < 2 or width < 2 or width % 2:
            raise ValueError(f"CORUN of {stages} stages, width {width}: at least 2 stages and an even width expected")

        self.stages, self.width = stages, width
        self.checkpoint_activations = checkpoint_activations

        # The names `first`, `basic` and `last` are those of the checkpoints in circulation.
        self.first = Stage(width, last=False)
        if stages > 2:
            self.basic = nn.ModuleList(Stage(width, last=False) for _ in range(stages - 2))
        self.last = Stage(width, last=True)

    def list_stages(self) -> list[Stage]:
        """List the stages in the order in which they run."""
        return [self.first, *getattr(self, "basic", ()), self.last]

    def unfold(self, hazy: Tensor) -> Iterator[Restoration]:
        """Yield the restoration J and `T_hat` of every stage, in order.

        `hazy` is `B 3 H W`, RGB in [0, 1]; H and W are multiples of 8.
        """
        # Start from no haze removed: J = J_hat = P, and T = 0.5 everywhere.
        scene = scene_estimate = hazy
        transmission = torch.full_like(hazy[:, :1], START_TRANSMISSION)

        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for stage in self.list_stages():
            scene, scene_estimate, transmission, transmission_estimate = stage(
                hazy, scene, scene_estimate, transmission, recompute=recompute
            )
            yield Restoration(scene, transmission_estimate)

    def forward(self, hazy: Tensor) -> Restoration:
        """Return the last stage's restoration.

        `hazy` is `B 3 H W`, RGB in [0, 1]; H and W are multiples of 8.
        """
        # A deque of length 1 frees the restorations of earlier stages at once.
        last = deque(self.unfold(hazy), maxlen=1)
        return last[0]

    def replace_cpmms(self, wrap: Callable[[CPMM], nn.Module]) -> "CORUN":
        """Return a copy for inference with other CPMMs.

        Each CPMM is replaced by `wrap(cpmm)`.
        """
        network = copy.deepcopy(self).eval()
        network.checkpoint_activations = False

        for stage in network.list_stages():
            for name, child in list(stage.named_children()):
                if isinstance(child, CPMM):
                    setattr(stage, name, wrap(child))
        return network


def start_as_published(network: CORUN) -> None:
    """Give a network random weights as the published code does, in place.

    Linear layers are normal with deviation 0.02, without bias. Convolutions are as torch makes them, also each CPMM's
    last one, which is zero in a fresh network of ours: a network that starts so restores worse than the closed form.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, CPMM):
            module.mapping.reset_parameters()
