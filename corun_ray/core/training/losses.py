"""The losses of pre-training and of Colabator, with the published weights.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3. A loss is skipped, and nothing is computed for it,
where its weight is 0 or where its needs are missing: the feature extractor, the density, or a transmission.

The perceptual and the contrastive loss compare features of images. Features of VGG-19 (Simonyan and Zisserman, ICLR
2015) have the layers and weights that were published with CORUN. The bands of a Laplacian pyramid (Burt and Adelson,
IEEE Transactions on Communications, 1983) need no pretrained network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corun_ray.core.networks.corun import Restoration
from corun_ray.core.weights import WeightsError, read_weights

VGG_FILE = "vgg19-dcbb9e9d.pth"
"""The name under which torchvision publishes its ImageNet weights."""

VGG_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 1))
"""Width and number of convolutions of each block; relu5_1 is the last layer in use."""

LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
"""The weights of VGG-19's relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1."""

FEATURE_WEIGHT = 0.2
"""A factor within the formulas of both feature losses."""

RATIO_EPSILON = 1e-7
"""Keeps the contrastive ratio finite where the restoration is the hazy image itself."""

LAPLACIAN_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0)
"""The weights of the bands, finest first, and of the low-pass rest."""

LAPLACIAN_RATIO_EPSILON = 3e-2
"""Keeps the contrastive ratio small where images are flat: the bands of flat patches are 0.

With 1e-3, the gradient of the contrastive loss was several hundred times that of the pixel loss.
"""

Features = Sequence[Tensor]
"""The features of a batch of images, one for each of the extractor's layers."""


class FeatureExtractor(Protocol):
    """Extracts the features that the perceptual and the contrastive loss compare."""

    layer_weights: tuple[float, ...]
    """The weights of the layers, in the order of their features."""
    ratio_epsilon: float
    """A summand of the denominators of the contrastive loss."""

    def __call__(self, images: Tensor) -> Features:
        """Extract the features of images, `B 3 H W` in [0, 1], with sides of 16 px and more."""


@dataclass(frozen=True)
class LossWeights:
    """The factors of the losses, 0 and above."""

    pixel: float
    scattering: float
    perceptual: float
    contrastive: float
    haze_density: float = 0.0
    transmission: float = 0.0
    """No part of the published losses."""


PRETRAIN_WEIGHTS = LossWeights(pixel=1.0, scattering=0.01, perceptual=0.0, contrastive=1.0)
COLABATOR_WEIGHTS = LossWeights(pixel=5.0, scattering=0.01, perceptual=0.2, contrastive=1.0)


def rehaze(restoration: Restoration) -> Tensor:
    """Compute the hazy image `J T + 1 - T` of a restoration.

    The airlight is 1, as in the network (equation 1 of the paper). Returns `B 3 H W` float32. Raises `ValueError` for a
    restoration without a transmission.
    """
    scene, transmission = restoration
    if transmission is None:
        raise ValueError("a restoration without a transmission explains no haze")

    transmission = transmission.float()
    return scene * transmission + 1 - transmission


def compute_perceptual(extractor: FeatureExtractor, found: Features, truth: Features) -> Tensor:
    """Compute the perceptual loss `0.2 sum w L1(f(x), f(y))`.

    `found` and `truth` are the features f of the images x and y. The layers' weights w are those of their extractor.
    """
    distances = []
    for weight, x, y in zip(extractor.layer_weights, found, truth, strict=True):
        distances.append(weight * _compute_distance(x, y))
    return FEATURE_WEIGHT * torch.stack(distances).sum()


def compute_contrastive(extractor: FeatureExtractor, found: Features, positive: Features, negative: Features) -> Tensor:
    """Compute the contrastive loss of three images' features.

    `0.2 sum w L1(f(x), f(positive)) / (L1(f(x), f(negative)) + epsilon)`, where f are the features, w the layers'
    weights. The loss pulls the restoration x towards the positive image and pushes it away from the negative one. Each
    L1 is a mean over the whole batch.
    """
    ratios = []
    for weight, x, near, far in zip(extractor.layer_weights, found, positive, negative, strict=True):
        ratios.append(weight * _compute_distance(x, near) / (_compute_distance(x, far) + extractor.ratio_epsilon))
    return FEATURE_WEIGHT * torch.stack(ratios).sum()


def _compute_distance(first: Tensor, second: Tensor) -> Tensor:
    """Compute the mean L1 distance in float32.

    Autocast may have computed the features in fewer bits.
    """
    return F.l1_loss(first.float(), second.float())


# --- The losses of a run ---


@dataclass(frozen=True)
class Losses:
    """The losses of a run. A step minimises the sum of what one of the methods returns."""

    weights: LossWeights
    features: FeatureExtractor | None = None
    """Needed by the perceptual and the contrastive loss."""
    density: Callable[[Tensor], Tensor] | None = None
    """Haze density of `B 3 H W` images in [0, 1], `B`, differentiable; needed by the haze-density loss."""

    def compute_pretraining(
        self, restoration: Restoration, clear: Tensor, hazy: Tensor, transmission: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the supervised losses on synthetic pairs.

        `restoration` (J and T_hat) restores `hazy` (P); `clear` and `hazy` are `B 3 H W` in [0, 1]. `transmission` is
        the true T, `B 1 H W` in [0, 1]. With the published weights, which do not use it, the sum is
        `L1(J, clear) + 0.01 L1(J T_hat + 1 - T_hat, P) + contrastive(J, clear, P)`.
        """
        scene, weights = restoration.scene, self.weights
        losses = {}

        # The scene is near the truth.
        if weights.pixel:
            losses["pixel"] = weights.pixel * (scene - clear).abs().mean()

        # Scene and transmission together explain the hazy image.
        if weights.scattering and restoration.transmission is not None:
            losses["scattering"] = weights.scattering * (rehaze(restoration) - hazy).abs().mean()

        # The transmission is near its truth.
        losses |= self._compute_transmission_loss(restoration, transmission)

        # The features of the scene are near those of the truth, and far from those of the hazy image.
        losses |= self._compute_feature_losses((scene, clear), (scene, clear, hazy))
        return losses | self._compute_density_loss(scene)

    def compute_colabator(
        self,
        synthetic: Restoration,
        clear: Tensor,
        real: Restoration,
        hazy_strong: Tensor,
        label: Tensor,
        trust: Tensor,
        transmission: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses on a synthetic and a real half-batch.

        `synthetic` is compared with `clear` and with the true `transmission`. `real` restores `hazy_strong` (the strong
        view of P), and is compared with `label` (J*) as far as `trust` (w*) goes. Images are `B 3 H W`, `trust` and
        `transmission` are `B 1 H W`, all in [0, 1]. As published, only the synthetic scene is clamped. With the
        published weights, which do not use the true transmission, the sum is

            5 [mean(0.5 |J_syn - clear|) + mean(0.5 |J_real - J*| w* 2)]
            + 0.01 mean(0.5 |J_real T_hat_real + 1 - T_hat_real - P_strong| w*)
            + 0.2 perceptual(J_syn, clear) + contrastive(J_real, J*, P_strong)
        """
        scene, weights = synthetic.scene.clamp(0, 1), self.weights
        losses = {}

        # The synthetic scene is near the truth, the real one near the label where the label is trusted.
        if weights.pixel:
            losses["pixel_synthetic"] = weights.pixel * 0.5 * (scene - clear).abs().mean()
            losses["pixel_real"] = weights.pixel * 0.5 * (2 * trust * (real.scene - label).abs()).mean()

        # The real scene and its transmission together explain the hazy image, where the label is trusted.
        if weights.scattering and real.transmission is not None:
            error = (rehaze(real) - hazy_strong).abs()
            losses["scattering"] = weights.scattering * 0.5 * (trust * error).mean()

        # The transmission of the synthetic half is near its truth.
        losses |= self._compute_transmission_loss(synthetic, transmission)

        # The same by features: perceptual on the synthetic half, contrastive on the real half.
        losses |= self._compute_feature_losses((scene, clear), (real.scene, label, hazy_strong))
        return losses | self._compute_density_loss(real.scene)

    def _compute_transmission_loss(self, restoration: Restoration, truth: Tensor | None) -> dict[str, Tensor]:
        """Compute the distance of the transmission to its truth, `L1(T_hat, T)`.

        The published losses know the transmission only by the scattering loss. That loss cannot tell a scene without
        haze removed and `T_hat = 1` from a right one.
        """
        weight = self.weights.transmission
        if not weight or truth is None or restoration.transmission is None:
            return {}
        return {"transmission": weight * _compute_distance(restoration.transmission, truth)}

    def _compute_feature_losses(
        self, similar: tuple[Tensor, Tensor], contrasted: tuple[Tensor, Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the perceptual and the contrastive loss.

        The perceptual loss is of (x, truth), the contrastive loss of (x, positive, negative). The first image of each
        tuple is a restoration, and the others are targets without a gradient.
        """
        # Collect the images of the losses that are on.
        active: dict[str, tuple[Tensor, ...]] = {}
        if self.weights.perceptual:
            active["perceptual"] = similar
        if self.weights.contrastive:
            active["contrastive"] = contrasted
        if self.features is None or not active:
            return {}

        restorations, targets = [], []
        for first, *others in active.values():
            restorations.append(first)
            targets.extend(others)

        # All restorations go through the extractor in one pass with a graph, and all targets in one pass without. An
        # image that both losses need goes through once.
        found = _extract_features(self.features, restorations)
        with torch.no_grad():
            found |= _extract_features(self.features, targets)

        losses = {}
        if "perceptual" in active:
            distance = compute_perceptual(self.features, *(found[image] for image in similar))
            losses["perceptual"] = self.weights.perceptual * distance
        if "contrastive" in active:
            distance = compute_contrastive(self.features, *(found[image] for image in contrasted))
            losses["contrastive"] = self.weights.contrastive * distance
        return losses

    def _compute_density_loss(self, scene: Tensor) -> dict[str, Tensor]:
        """Compute the haze-density loss, which the paper adds.

        It is the mean haze density of the restored scenes.
        """
        if self.density is None or not self.weights.haze_density:
            return {}
        return {"haze_density": self.weights.haze_density * self.density(scene.float().clamp(0, 1)).mean()}


def _extract_features(extractor: FeatureExtractor, images: Sequence[Tensor]) -> dict[Tensor, Features]:
    """Extract the features of distinct batches, in one pass."""
    # Tensors hash by identity, so the same batch counts once.
    distinct = list(dict.fromkeys(images))
    counts = [len(batch) for batch in distinct]

    # Split every layer's features into those of the batches.
    parts = [layer.split(counts) for layer in extractor(torch.cat(distinct))]
    return dict(zip(distinct, zip(*parts, strict=True), strict=True))


# --- The feature extractors ---


class LaplacianFeatures(nn.Module):
    """Band-pass levels of an image and the low-pass rest, without parameters."""

    layer_weights: tuple[float, ...] = LAPLACIAN_WEIGHTS
    ratio_epsilon = LAPLACIAN_RATIO_EPSILON

    def forward(self, images: Tensor) -> list[Tensor]:
        """Split images into four bands, finest first, and the rest at a sixteenth of their sides.

        The images are `B 3 H W`, with sides of 16 px and more. Each band has half the sides of the one before.
        """
        # Bands are small differences: bfloat16 would round them away.
        rest = images.float()

        # A band is what an image loses when its sides are halved.
        levels = []
        for _ in self.layer_weights[1:]:
            half = F.avg_pool2d(rest, 2)
            levels.append(rest - F.interpolate(half, size=rest.shape[-2:], mode="bilinear"))
            rest = half
        return [*levels, rest]


class Vgg19Features(nn.Module):
    """VGG-19 up to relu5_1; layers have the numbers of torchvision's `features`."""

    layer_weights: tuple[float, ...] = LAYER_WEIGHTS
    ratio_epsilon = RATIO_EPSILON

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, taps = 3, []
        for block, (width, count) in enumerate(VGG_BLOCKS):
            if block:
                layers.append(nn.MaxPool2d(2))

            # A block's feature is taken after the ReLU of its first convolution.
            taps.append(len(layers) + 1)
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width

        self.features = nn.Sequential(*layers)
        self._taps = frozenset(taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract the five features of images.

        The images are `B 3 H W` in [0, 1], with sides of 16 px and more. As published, the images are not normalised.
        """
        found = []
        for index, layer in enumerate(self.features):
            images = layer(images)
            if index in self._taps:
                found.append(images)
        return found


def load_vgg19(path: Path) -> Vgg19Features:
    """Load the frozen feature network from torchvision's file, without its classifier.

    Raises `WeightsError` for any other file.
    """
    content = read_weights(path)

    # On the meta device, no time goes into random initial weights.
    with torch.device("meta"):
        network = Vgg19Features()

    # Take the tensors that the network has, and check their shapes.
    weights = {}
    for name, expected in network.state_dict().items():
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            raise WeightsError(f"{path}: not the weights of VGG-19 (no {name} of shape {tuple(expected.shape)})")
        weights[name] = found.float()

    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()
