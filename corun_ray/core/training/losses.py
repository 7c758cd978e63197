"""Training losses with the published weights (Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3).

A term is left out where its weight is 0, or where what it needs is absent: the feature network, the density, or a
transmission. Nothing is then computed for it.


VGG-19 as a measure of how alike two images look: the features that the losses compare.

Source: Simonyan and Zisserman, ICLR 2015; layers and weights as published with CORUN (arXiv 2406.07966)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corun_ray.core.networks.corun import Restoration
from corun_ray.core.weights import WeightsError, read_weights

VGG_FILE = "vgg19-dcbb9e9d.pth"
"""torchvision's published ImageNet weights, under the name at which it offers them."""

LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
"""What relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1 count for."""

_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 1))  # width and convolutions; relu5_1 is the last one used


class Vgg19Features(nn.Module):
    """VGG-19 as far as relu5_1, its layers numbered as torchvision numbers those of `features`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, taps = 3, []
        for block, (width, count) in enumerate(_BLOCKS):
            if block:
                layers.append(nn.MaxPool2d(2))
            taps.append(len(layers) + 1)
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self._taps = frozenset(taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The five features of `B 3 H W` images in [0, 1], sides of 16 px and more; as published, not normalised."""
        found = []
        for index, layer in enumerate(self.features):
            images = layer(images)
            if index in self._taps:
                found.append(images)
        return found


def load_vgg19(path: Path) -> Vgg19Features:
    """The frozen network with the weights of torchvision's file (its classifier is left out); raises `WeightsError`."""
    content = read_weights(path)
    # On the meta device no time goes into a random start.
    with torch.device("meta"):
        network = Vgg19Features()
    weights = {}
    for name, expected in network.state_dict().items():
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            raise WeightsError(f"{path}: not the weights of VGG-19 (no {name} of shape {tuple(expected.shape)})")
        weights[name] = found.float()
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


FEATURE_WEIGHT = 0.2  # of both feature distances, within their formulas
RATIO_EPSILON = 1e-7  # only keeps the contrastive ratio finite where the input itself was restored

Features = Sequence[Tensor]


@dataclass(frozen=True)
class LossWeights:
    """The factor of every term, 0 and above."""

    pixel: float
    scattering: float
    perceptual: float
    contrastive: float
    haze_density: float = 0.0


PRETRAIN_WEIGHTS = LossWeights(pixel=1.0, scattering=0.01, perceptual=0.0, contrastive=1.0)
COLABATOR_WEIGHTS = LossWeights(pixel=5.0, scattering=0.01, perceptual=0.2, contrastive=1.0)


def rehaze(restoration: Restoration) -> Tensor:
    """The hazy image that a restoration explains, `J T + 1 - T` (airlight 1), B 3 H W float32."""
    scene, transmission = restoration
    if transmission is None:
        raise ValueError("a restoration without a transmission explains no haze")
    transmission = transmission.float()
    return scene * transmission + 1 - transmission


def compute_perceptual(found: Features, truth: Features) -> Tensor:
    """`0.2 sum w L1(f(x), f(y))` of two images' features."""
    layers = zip(LAYER_WEIGHTS, found, truth, strict=True)
    return FEATURE_WEIGHT * torch.stack([w * _distance(x, y) for w, x, y in layers]).sum()


def compute_contrastive(found: Features, positive: Features, negative: Features) -> Tensor:
    """`0.2 sum w L1(f(x), f(positive)) / L1(f(x), f(negative))`, each L1 a mean over the whole batch."""
    layers = zip(LAYER_WEIGHTS, found, positive, negative, strict=True)
    ratios = [w * _distance(x, near) / (_distance(x, far) + RATIO_EPSILON) for w, x, near, far in layers]
    return FEATURE_WEIGHT * torch.stack(ratios).sum()


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Float32 also where autocast computed the features in fewer bits."""
    return F.l1_loss(first.float(), second.float())


@dataclass(frozen=True)
class Losses:
    """The losses of a run; each method's sum is what a step minimises."""

    weights: LossWeights
    features: Vgg19Features | None = None
    """For the perceptual and the contrastive term."""
    density: Callable[[Tensor], Tensor] | None = None
    """`B 3 H W` in [0, 1] to the haze density of each, `B`, differentiable; for the haze-density term."""

    def compute_pretraining(self, restoration: Restoration, clear: Tensor, hazy: Tensor) -> dict[str, Tensor]:
        """Supervised losses on a synthetic pair; `clear` and `hazy` B 3 H W in [0, 1]."""
        scene, weights, losses = restoration.scene, self.weights, {}
        if weights.pixel:
            losses["pixel"] = weights.pixel * (scene - clear).abs().mean()
        if weights.scattering and restoration.transmission is not None:
            losses["scattering"] = weights.scattering * (rehaze(restoration) - hazy).abs().mean()
        return losses | self._feature_losses((scene, clear), (scene, clear, hazy)) | self._density_loss(scene)

    def compute_colabator(
        self,
        synthetic: Restoration,
        clear: Tensor,
        real: Restoration,
        hazy_strong: Tensor,
        label: Tensor,
        trust: Tensor,
    ) -> dict[str, Tensor]:
        """The student's losses on a synthetic and on a real half-batch.

        `clear`, `hazy_strong` (the strong view that `real` restores) and `label` (J*) B 3 H W, `trust` (w*)
        B 1 H W; all in [0, 1]. As published, only the synthetic scene is clamped.
        """
        scene, weights, losses = synthetic.scene.clamp(0, 1), self.weights, {}
        if weights.pixel:
            losses["pixel_synthetic"] = weights.pixel * 0.5 * (scene - clear).abs().mean()
            losses["pixel_real"] = weights.pixel * 0.5 * (2 * trust * (real.scene - label).abs()).mean()
        if weights.scattering and real.transmission is not None:
            error = (rehaze(real) - hazy_strong).abs()
            losses["scattering"] = weights.scattering * 0.5 * (trust * error).mean()
        losses |= self._feature_losses((scene, clear), (real.scene, label, hazy_strong))
        return losses | self._density_loss(real.scene)

    def _feature_losses(
        self, similar: tuple[Tensor, Tensor], contrasted: tuple[Tensor, Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Perceptual loss of (x, truth), contrastive loss of (x, positive, negative).

        The targets learn nothing: they go through the network in one pass without a graph, the restorations in one
        with it, and an image that both terms need goes once.
        """
        active: dict[str, tuple[Tensor, ...]] = {}
        if self.weights.perceptual:
            active["perceptual"] = similar
        if self.weights.contrastive:
            active["contrastive"] = contrasted
        if self.features is None or not active:
            return {}
        live = _extract(self.features, [images[0] for images in active.values()])
        with torch.no_grad():
            frozen = _extract(self.features, [target for images in active.values() for target in images[1:]])
        found = live | frozen
        losses = {}
        if "perceptual" in active:
            losses["perceptual"] = self.weights.perceptual * compute_perceptual(*(found[image] for image in similar))
        if "contrastive" in active:
            losses["contrastive"] = self.weights.contrastive * compute_contrastive(
                *(found[image] for image in contrasted)
            )
        return losses

    def _density_loss(self, scene: Tensor) -> dict[str, Tensor]:
        if self.density is None or not self.weights.haze_density:
            return {}
        return {"haze_density": self.weights.haze_density * self.density(scene.float().clamp(0, 1)).mean()}


def _extract(network: Vgg19Features, images: Sequence[Tensor]) -> dict[Tensor, Features]:
    """The features of every distinct tensor of images, all in one pass."""
    distinct = list(dict.fromkeys(images))  # tensors hash by identity
    counts = [len(batch) for batch in distinct]
    parts = [layer.split(counts) for layer in network(torch.cat(distinct))]
    return dict(zip(distinct, zip(*parts, strict=True), strict=True))
