"""FADE, a reference-free measure of fog density (Choi, You, Bovik, IEEE TIP 2015).

Twelve statistics of every 8 x 8 patch are compared with two Gaussian models, one of fog-free and one of foggy
photographs. The models are the authors' published ones (notice in `NOTICE`). The further from the fog-free model and
the nearer to the foggy one, the higher the score. 0.3 is a clear day, 1 a haze, 5 a dense fog.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_FEATURES = 12
PATCH_PX = 8
# The contrast filter extends an image by ten of its own rows.
MIN_SIDE_PX = 16

# Weights of grey by BT.601, to double precision.
GREY_WEIGHTS = (0.298936021293775, 0.587043074451121, 0.114020904255103)

WINDOW_SIGMA_PX = 7 / 6
WINDOW_RADIUS_PX = 3

CONTRAST_SIGMA_PX = 3.25
CONTRAST_SEMISATURATION = 0.1
# Of grey, blue-yellow, red-green.
CONTRAST_THRESHOLDS = (0.2353, 0.2287, 0.0528)


# --- The score ---


def fade(images: Tensor) -> Tensor:
    """Compute the fog density of each image.

    0 and up, lower is clearer. `images` is `B 3 H W`, RGB in [0, 1]; sides are cropped to multiples of 8. Returns `B`
    (float64). An image without any patch that can be rated (an all-black one) scores NaN.

    Raises `ValueError` for other shapes and for sides under 16 px.
    """
    to_clear, to_foggy = compute_distances(images)
    return to_clear.nanmean((1, 2)) / (to_foggy.nanmean((1, 2)) + 1)


@torch.no_grad()
def compute_distances(images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute every patch's distances to both models.

    Returns the distance to the fog-free model and to the foggy one. Each is `B H/8 W/8`; for `images`, see `fade`.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIDE_PX:
        shape = tuple(images.shape)
        raise ValueError(f"FADE: expected RGB images B 3 H W, sides of {MIN_SIDE_PX} px and more, got {shape}")

    # The models were fitted to 8-bit images. float64, because variances are differences of large numbers.
    height, width = (side // PATCH_PX * PATCH_PX for side in images.shape[2:])
    pixels = images[..., :height, :width].double().clamp(0, 1).mul(255).round()

    features = torch.log1p(_compute_features(pixels))
    clear, foggy = load_patch_models()
    return _compute_mahalanobis(features, clear), _compute_mahalanobis(features, foggy)


# --- Patch models ---


@dataclass(frozen=True)
class PatchModel:
    """A Gaussian over the log features of 8 x 8 patches: mean of 12, covariance 12 x 12."""

    mean: list[float]
    covariance: list[list[float]]


@cache
def load_patch_models() -> tuple[PatchModel, PatchModel]:
    """Load the models of fog-free and of foggy photographs."""
    text = resources.files("corun_ray.core.metrics").joinpath("fade_models.json").read_text()
    models = json.loads(text)
    return PatchModel(**models["fogfree"]), PatchModel(**models["foggy"])


def _compute_mahalanobis(features: Tensor, model: PatchModel) -> Tensor:
    """Compute the distance of features to a model.

    `... 12` → `...`. The covariance is the average of the model's and of a matrix filled with `v`, the variance over
    the patch's own twelve features. That is a rank-one change, `C/2 + (v/2) 1 1'`, so one inverse serves all patches
    (Sherman-Morrison).
    """
    mean = torch.tensor(model.mean, dtype=features.dtype, device=features.device)
    covariance = torch.tensor(model.covariance, dtype=features.dtype, device=features.device)
    inverse = torch.linalg.inv(covariance / 2)

    # The distance by `C/2` alone, less the correction for the rank-one change.
    half_variance = features.var(-1) / 2
    difference = features - mean
    weighted = difference @ inverse
    along_ones = weighted.sum(-1)
    squared = (weighted * difference).sum(-1) - half_variance * along_ones**2 / (1 + half_variance * inverse.sum())
    return squared.clamp_min(0).sqrt()


# --- Features ---


def _compute_features(pixels: Tensor) -> Tensor:
    """Compute the twelve statistics of each patch.

    Returns `B H/8 W/8 12`, NaN where undefined. `pixels` is `B 3 H W`, whole numbers in 0...255.
    """
    red, green, blue = pixels.unbind(1)
    grey = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(GREY_WEIGHTS))
    grey_8bit = grey.round()
    blue_yellow = (red + green) / 2 - blue
    red_green = red - green

    features = [
        *_compute_naturalness(grey_8bit),
        *_compute_contrast_energies(torch.stack([grey, blue_yellow, red_green], 1)),
        _compute_entropy(grey_8bit),
        # Feature 10: the dark channel.
        _split_into_patches(pixels.amin(1) / 255).mean(-1),
        # Feature 11: saturation.
        _split_into_patches(_compute_saturation(pixels)).mean(-1),
        _compute_colourfulness(red_green, blue_yellow),
    ]
    assert len(features) == NUM_FEATURES
    return torch.stack(features, -1)


def _compute_naturalness(grey: Tensor) -> list[Tensor]:
    """Compute features 1 to 5, the naturalness.

    They come from mean subtracted, contrast normalised (MSCN) grey. `grey` is `B H W`, whole numbers in 0...255; each
    feature is `B H/8 W/8`.
    """
    taps = torch.arange(-WINDOW_RADIUS_PX, WINDOW_RADIUS_PX + 1, dtype=grey.dtype)
    window = torch.exp(-(taps**2) / (2 * WINDOW_SIGMA_PX**2))
    window /= window.sum()

    def smooth(x: Tensor) -> Tensor:
        """Average over the Gaussian window.

        By columns and then by rows.
        """
        radius = WINDOW_RADIUS_PX
        padded = F.pad(x.unsqueeze(1), (radius, radius, radius, radius), mode="replicate").squeeze(1)
        return _filter(_filter(padded, window, -1), window, -2)

    mean = smooth(grey)
    deviation = (smooth(grey * grey) - mean * mean).abs().sqrt()

    # Where the image is flat, the sign of a rounding error counts: take the authors' program's.
    residue = torch.tensor(_compute_flat_residues(), dtype=grey.dtype, device=grey.device)[grey.long()]
    difference = grey - mean
    difference = difference.where(difference.abs() > 1e-9, residue)

    # Statistics of MSCN and of the products of vertical neighbours.
    mscn = difference / (deviation + 1)
    products = _split_into_patches(mscn * mscn.roll(1, dims=-2))
    return [
        _split_into_patches(mscn).var(-1),
        _compute_variance_where(products, products >= 0),
        _compute_variance_where(products, products <= 0),
        _split_into_patches(deviation).mean(-1),
        _split_into_patches(deviation / mean).mean(-1),
    ]


@cache
def _compute_flat_residues() -> tuple[float, ...]:
    """Compute grey minus its local mean in flat images.

    For each grey level 0...255. Zero but for rounding. Yet the authors' program decides by its sign whether a flat
    patch has a negative part or is undefined, and skies are full of flat patches. So the 49-tap sum is repeated here in
    double precision, in that program's order, which makes the score the same on every device.
    """
    offsets = range(-WINDOW_RADIUS_PX, WINDOW_RADIUS_PX + 1)
    taps = []
    for x in offsets:
        for y in offsets:
            taps.append(math.exp(-(x * x + y * y) / (2 * WINDOW_SIGMA_PX**2)))

    # The authors' program normalises twice: by a sum over all taps, then by a sum of the rows' sums.
    total = _sum_in_order(taps)
    taps = [tap / total for tap in taps]
    row_sums = []
    for start in range(0, len(taps), len(offsets)):
        row_sums.append(_sum_in_order(taps[start : start + len(offsets)]))
    total = _sum_in_order(row_sums)
    taps = [tap / total for tap in taps]

    residues = []
    for level in range(256):
        residues.append(level - _sum_in_order([tap * level for tap in taps]))
    return tuple(residues)


def _sum_in_order(values: list[float]) -> float:
    """Sum from left to right.

    The built-in `sum` compensates rounding from Python 3.12 on.
    """
    total = 0.0
    for value in values:
        total += value
    return total


def _compute_contrast_energies(opponents: Tensor) -> list[Tensor]:
    """Compute features 6 to 8, the contrast energies.

    Of grey, blue-yellow and red-green. `opponents` is `B 3 H W`; each feature is `B H/8 W/8`.
    """
    # Extend by the ten outermost rows, in their own order; the kernel reaches nine back and ten ahead.
    kernel = _build_contrast_kernel(opponents.dtype)
    tall = torch.cat([opponents[..., 1:10, :], opponents, opponents[..., -10:, :]], -2)
    wide = torch.cat([opponents[..., 1:10], opponents, opponents[..., -10:]], -1)
    magnitude = torch.hypot(_filter(tall, kernel, -2), _filter(wide, kernel, -1))

    # Normalise by the largest value. A channel without any contrast has 0 / 0 here; its energy is 0.
    largest = magnitude.amax((-2, -1), keepdim=True)
    energy = (magnitude * largest / (magnitude + CONTRAST_SEMISATURATION * largest)).nan_to_num(0.0)

    # Energies below the noise threshold count as 0.
    thresholds = torch.tensor(CONTRAST_THRESHOLDS, dtype=energy.dtype, device=energy.device)
    energy = (energy - thresholds[:, None, None]).clamp_min(0)
    return [_split_into_patches(channel).mean(-1) for channel in energy.unbind(1)]


def _build_contrast_kernel(dtype: torch.dtype) -> Tensor:
    """Build the second derivative of a Gaussian.

    20 taps at -9.25 ... 9.75 px. Its mean is zero, its response to a parabola is one. Off centre by a quarter of a
    pixel, as in the authors' program.
    """
    sigma = CONTRAST_SIGMA_PX
    x = torch.arange(20, dtype=dtype) - 9.25
    gaussian = torch.exp(-(x**2) / (2 * sigma**2))
    gaussian /= gaussian.sum()

    kernel = (x**2 / sigma**4 - 1 / sigma**2) * gaussian
    kernel -= kernel.mean()
    return kernel / (0.5 * x**2 * kernel).sum()


def _compute_entropy(grey: Tensor) -> Tensor:
    """Compute feature 9, the entropy of each patch in bits.

    `grey` is `B H W`, whole numbers in 0...255.
    """
    patches = _split_into_patches(grey).sort(-1).values
    # How often a pixel's own value occurs in its patch, for every pixel.
    occurrences = torch.searchsorted(patches, patches, right=True) - torch.searchsorted(patches, patches)
    return 2 * math.log2(PATCH_PX) - occurrences.to(grey.dtype).log2().mean(-1)


def _compute_saturation(pixels: Tensor) -> Tensor:
    """Compute the HSV saturation in [0, 1].

    `B 3 H W` → `B H W`; 0 for black.
    """
    largest = pixels.amax(1)
    return (largest - pixels.amin(1)) / largest.clamp_min(1)


def _compute_colourfulness(red_green: Tensor, blue_yellow: Tensor) -> Tensor:
    """Compute feature 12, the colourfulness of each patch.

    Source: Hasler and Suesstrunk, 2003. Both opponent channels are `B H W` of colours in 0...255.
    """
    red_green, blue_yellow = _split_into_patches(red_green), _split_into_patches(blue_yellow)
    spread = (red_green.var(-1) + blue_yellow.var(-1)).sqrt()
    return spread + 0.3 * torch.hypot(red_green.mean(-1), blue_yellow.mean(-1))


# --- Tools ---


def _compute_variance_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Compute the variance of chosen values.

    Unbiased, over the last axis. NaN where no value is chosen, 0 for a single value.
    """
    count = chosen.sum(-1)
    mean = values.where(chosen, 0).sum(-1) / count
    squares = (values - mean.unsqueeze(-1)).square().where(chosen, 0).sum(-1)
    return squares / (count - (count > 1).to(count.dtype))


def _filter(x: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Correlate with a 1-d kernel along `dim`, valid part."""
    # A sum of shifted images is faster here than a float64 convolution.
    length = x.shape[dim] - len(kernel) + 1
    result = x.narrow(dim, 0, length) * float(kernel[0])
    for offset, tap in enumerate(kernel[1:].tolist(), start=1):
        result.add_(x.narrow(dim, offset, length), alpha=tap)
    return result


def _split_into_patches(x: Tensor) -> Tensor:
    """Split into the pixels of distinct patches.

    `B H W` → `B H/8 W/8 64`.
    """
    batch, height, width = x.shape
    rows, columns = height // PATCH_PX, width // PATCH_PX
    grid = x.reshape(batch, rows, PATCH_PX, columns, PATCH_PX).transpose(2, 3)
    return grid.reshape(batch, rows, columns, PATCH_PX**2)
