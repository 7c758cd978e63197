"""FADE, a reference-free measure of fog density (Choi, You, Bovik, IEEE TIP 2015).

Twelve statistics of every 8 x 8 patch are compared with two Gaussian models, one of fog-free and one of
foggy photographs (`fade_model`). The further from the fog-free one and the nearer to the foggy one, the
higher the score. 0.3 is a clear day, 1 a haze, 5 a dense fog.


The two patch models of FADE as its authors published them (notice in `NOTICE`)."""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_FEATURES = 12


@dataclass(frozen=True)
class PatchModel:
    """A Gaussian over the log features of 8 x 8 patches: mean of 12, covariance 12 x 12."""

    mean: list[float]
    covariance: list[list[float]]


@cache
def load_patch_models() -> tuple[PatchModel, PatchModel]:
    """The model of fog-free and that of foggy photographs (Choi, You, Bovik, IEEE TIP 2015)."""
    text = resources.files("corun_ray.core.metrics").joinpath("fade_models.json").read_text()
    models = json.loads(text)
    return PatchModel(**models["fogfree"]), PatchModel(**models["foggy"])


PATCH_PX = 8
MIN_SIDE_PX = 16  # the contrast filter extends an image by ten of its own rows

GREY_WEIGHTS = (0.298936021293775, 0.587043074451121, 0.114020904255103)  # BT.601 to double precision
WINDOW_SIGMA_PX = 7 / 6
CONTRAST_SIGMA_PX = 3.25
CONTRAST_SEMISATURATION = 0.1
CONTRAST_THRESHOLDS = (0.2353, 0.2287, 0.0528)  # grey, blue-yellow, red-green


def fade(images: Tensor) -> Tensor:
    """Fog density of each image, 0 and up, lower is clearer.

    `images` is `B 3 H W`, RGB in [0, 1]; sides are cropped to multiples of 8. Returns `B` (float64). An
    image without one patch that can be rated (an all-black one) scores NaN. Raises `ValueError` for other
    shapes and for sides under 16 px.
    """
    to_clear, to_foggy = compute_distances(images)
    return to_clear.nanmean((1, 2)) / (to_foggy.nanmean((1, 2)) + 1)


def compute_density_map(images: Tensor) -> Tensor:
    """Fog density of each 8 x 8 patch: `B 3 H W` in [0, 1] to `B 1 H/8 W/8`, lower is clearer.

    Patches whose statistics are undefined are NaN; otherwise as :func:`fade`.
    """
    to_clear, to_foggy = compute_distances(images)
    return (to_clear / (to_foggy + 1)).unsqueeze(1)


@torch.no_grad()
def compute_distances(images: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of every patch to the fog-free and to the foggy model, each `B H/8 W/8`; see `fade`."""
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIDE_PX:
        shape = tuple(images.shape)
        raise ValueError(f"FADE: expected RGB images B 3 H W, sides of {MIN_SIDE_PX} px and more, got {shape}")
    height, width = (side // PATCH_PX * PATCH_PX for side in images.shape[2:])
    # The model was fitted to 8-bit images; float64 because variances are differences of large numbers.
    pixels = images[..., :height, :width].double().clamp(0, 1).mul(255).round()
    features = torch.log1p(_features(pixels))
    clear, foggy = load_patch_models()
    return _mahalanobis(features, clear), _mahalanobis(features, foggy)


def _mahalanobis(features: Tensor, model: PatchModel) -> Tensor:
    """Distance of `... 12` features to a model.

    The covariance is the average of the model's and of a matrix filled with `v`, the variance over the
    patch's own twelve features. That is a rank-one change, `C/2 + (v/2) 1 1'`, so one inverse serves all
    patches (Sherman-Morrison).
    """
    mean = torch.tensor(model.mean, dtype=features.dtype, device=features.device)
    covariance = torch.tensor(model.covariance, dtype=features.dtype, device=features.device)
    inverse = torch.linalg.inv(covariance / 2)
    half_variance = features.var(-1) / 2
    difference = features - mean
    weighted = difference @ inverse
    along_ones = weighted.sum(-1)
    squared = (weighted * difference).sum(-1) - half_variance * along_ones**2 / (1 + half_variance * inverse.sum())
    return squared.clamp_min(0).sqrt()


def _features(pixels: Tensor) -> Tensor:
    """The twelve statistics: `B 3 H W` whole numbers in 0...255 to `B H/8 W/8 12`, NaN where undefined."""
    red, green, blue = pixels.unbind(1)
    grey = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(GREY_WEIGHTS))
    grey_8bit = grey.round()
    blue_yellow = (red + green) / 2 - blue
    red_green = red - green
    features = [
        *_naturalness(grey_8bit),
        *_contrast_energies(torch.stack([grey, blue_yellow, red_green], 1)),
        _entropy(grey_8bit),
        _patches(pixels.amin(1) / 255).mean(-1),
        _patches(_saturation(pixels)).mean(-1),
        _colourfulness(red_green, blue_yellow),
    ]
    assert len(features) == NUM_FEATURES
    return torch.stack(features, -1)


def _naturalness(grey: Tensor) -> list[Tensor]:
    """Features 1 to 5, from mean subtracted, contrast normalised (MSCN) grey: `B H W` to `B H/8 W/8` each."""
    taps = torch.arange(-3, 4, dtype=grey.dtype)
    window = torch.exp(-(taps**2) / (2 * WINDOW_SIGMA_PX**2))
    window /= window.sum()

    def smooth(x: Tensor) -> Tensor:
        padded = F.pad(x.unsqueeze(1), (3, 3, 3, 3), mode="replicate").squeeze(1)
        return _filter(_filter(padded, window, -1), window, -2)

    mean = smooth(grey)
    deviation = (smooth(grey * grey) - mean * mean).abs().sqrt()
    residue = torch.tensor(_flat_residues(), dtype=grey.dtype, device=grey.device)[grey.long()]
    difference = grey - mean
    difference = difference.where(difference.abs() > 1e-9, residue)
    mscn = difference / (deviation + 1)
    products = _patches(mscn * mscn.roll(1, dims=-2))
    return [
        _patches(mscn).var(-1),
        _variance_where(products, products >= 0),
        _variance_where(products, products <= 0),
        _patches(deviation).mean(-1),
        _patches(deviation / mean).mean(-1),
    ]


@cache
def _flat_residues() -> tuple[float, ...]:
    """Grey minus its own local mean where the image is flat, for each grey level 0...255.

    Zero but for rounding; yet the authors' program decides by its sign whether a flat patch has a negative
    part or is undefined, and skies are full of flat patches. So the 49-tap sum is repeated here in double
    precision, in that program's order, which makes the score the same on every device.
    """
    square = [[math.exp(-(x * x + y * y) / (2 * WINDOW_SIGMA_PX**2)) for y in range(-3, 4)] for x in range(-3, 4)]
    total = _running_sum([tap for row in square for tap in row])
    square = [[tap / total for tap in row] for row in square]
    total = _running_sum([_running_sum(row) for row in square])  # that program normalises twice
    taps = [tap / total for row in square for tap in row]
    return tuple(level - _running_sum([tap * level for tap in taps]) for level in range(256))


def _running_sum(values: list[float]) -> float:
    """Plain left-to-right sum: the built-in `sum` compensates rounding from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total


def _contrast_energies(opponents: Tensor) -> list[Tensor]:
    """Features 6 to 8: `B 3 H W` of grey, blue-yellow, red-green to three `B H/8 W/8`."""
    kernel = _contrast_kernel(opponents.dtype)
    # Ten outermost rows are repeated in their own order; the kernel reaches nine back and ten ahead.
    tall = torch.cat([opponents[..., 1:10, :], opponents, opponents[..., -10:, :]], -2)
    wide = torch.cat([opponents[..., 1:10], opponents, opponents[..., -10:]], -1)
    magnitude = torch.hypot(_filter(tall, kernel, -2), _filter(wide, kernel, -1))
    largest = magnitude.amax((-2, -1), keepdim=True)
    # A channel without any contrast has 0 / 0 here; its energy is 0.
    energy = (magnitude * largest / (magnitude + CONTRAST_SEMISATURATION * largest)).nan_to_num(0.0)
    thresholds = torch.tensor(CONTRAST_THRESHOLDS, dtype=energy.dtype, device=energy.device)
    energy = (energy - thresholds[:, None, None]).clamp_min(0)
    return [_patches(channel).mean(-1) for channel in energy.unbind(1)]


def _contrast_kernel(dtype: torch.dtype) -> Tensor:
    """Second derivative of a Gaussian, 20 taps at -9.25 ... 9.75 px, zero mean, unit response to a parabola.

    Off centre by a quarter of a pixel, as in the authors' program.
    """
    sigma = CONTRAST_SIGMA_PX
    x = torch.arange(20, dtype=dtype) - 9.25
    gaussian = torch.exp(-(x**2) / (2 * sigma**2))
    gaussian /= gaussian.sum()
    kernel = (x**2 / sigma**4 - 1 / sigma**2) * gaussian
    kernel -= kernel.mean()
    return kernel / (0.5 * x**2 * kernel).sum()


def _entropy(grey: Tensor) -> Tensor:
    """Feature 9, entropy in bits of each patch of whole-numbered `B H W` grey in 0...255."""
    patches = _patches(grey).sort(-1).values
    # How often a pixel's own value occurs in its patch, for every pixel.
    occurrences = torch.searchsorted(patches, patches, right=True) - torch.searchsorted(patches, patches)
    return 2 * math.log2(PATCH_PX) - occurrences.to(grey.dtype).log2().mean(-1)


def _saturation(pixels: Tensor) -> Tensor:
    """HSV saturation in [0, 1]: `B 3 H W` to `B H W`, 0 for black."""
    largest = pixels.amax(1)
    return (largest - pixels.amin(1)) / largest.clamp_min(1)


def _colourfulness(red_green: Tensor, blue_yellow: Tensor) -> Tensor:
    """Feature 12 (Hasler and Suesstrunk, 2003) of each patch of two opponent channels `B H W` in 0...255."""
    red_green, blue_yellow = _patches(red_green), _patches(blue_yellow)
    spread = (red_green.var(-1) + blue_yellow.var(-1)).sqrt()
    return spread + 0.3 * torch.hypot(red_green.mean(-1), blue_yellow.mean(-1))


def _variance_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Unbiased variance over the last axis of the chosen values only; NaN where there are none, 0 for one."""
    count = chosen.sum(-1)
    mean = values.where(chosen, 0).sum(-1) / count
    squares = (values - mean.unsqueeze(-1)).square().where(chosen, 0).sum(-1)
    return squares / (count - (count > 1).to(count.dtype))


def _filter(x: Tensor, kernel: Tensor, dim: int) -> Tensor:
    """Correlation with a 1-d kernel along `dim`, valid part.

    As shifted sums, which are quicker here than a float64 convolution.
    """
    length = x.shape[dim] - len(kernel) + 1
    result = x.narrow(dim, 0, length) * float(kernel[0])
    for offset, tap in enumerate(kernel[1:].tolist(), start=1):
        result.add_(x.narrow(dim, offset, length), alpha=tap)
    return result


def _patches(x: Tensor) -> Tensor:
    """`B H W` to the pixels of its distinct patches, `B H/8 W/8 64`."""
    batch, height, width = x.shape
    rows, columns = height // PATCH_PX, width // PATCH_PX
    grid = x.reshape(batch, rows, PATCH_PX, columns, PATCH_PX).transpose(2, 3)
    return grid.reshape(batch, rows, columns, PATCH_PX**2)
