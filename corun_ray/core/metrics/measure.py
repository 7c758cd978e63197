"""Measuring a picture: PSNR, SSIM and FADE by this package, any other metric by pyiqa from weights on this machine."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.errors import format_error
from corun_ray.core.metrics.catalog import OWN_METRICS, list_metrics
from corun_ray.core.metrics.fade import fade
from corun_ray.core.metrics.pyiqa import build_metric, get_file_name
from corun_ray.core.weights import WeightsSource

SSIM_SIGMA_PX = 1.5
SSIM_WINDOW_PX = 11

Measure = Callable[[Tensor, Tensor | None], float]
"""A picture and its truth, both 1 3 H W in [0, 1] (the truth may be None) → the metric's own score."""

Rate = Callable[[Tensor, Tensor | None], Tensor]
"""As `Measure`, but the score as a tensor and without any check."""


class Unmeasured(ValueError):
    """A picture that a metric has no score for; the message is the reason on one line."""


# --- Full-reference metrics ---


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio in dB.

    Over all pixels and channels. Both are B 3 H W in [0, 1]; returns B, infinite where they are equal.
    """
    return -10 * (images - truth).square().flatten(1).mean(1).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Compute the structural similarity, mean over channels.

    Source: Wang et al., IEEE TIP 2004. Both are B 3 H W in [0, 1]; returns B. The window is an 11 px Gaussian of sigma
    1.5, only at positions where it fits: sides must have at least 11 px.
    """
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=torch.float64, device=images.device) - SSIM_WINDOW_PX // 2
    taps = torch.exp(-offsets.square() / (2 * SSIM_SIGMA_PX**2))
    taps = taps / taps.sum()

    def blur(x: Tensor) -> Tensor:
        """Average each channel over the window.

        By rows and then by columns: B 3 H W → B N.
        """
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, taps[None, None, :, None]), taps[None, None, None, :]).view(len(x), -1)

    # Local means, variances and covariance; float64, because variances are differences of large numbers.
    x, y = images.double(), truth.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y

    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean(1).float()


# --- Transmission ---


def rank_correlation(found: Tensor, truth: Tensor) -> float:
    """Compute Spearman's rank correlation of two maps of the same size, in [-1, 1].

    It asks whether a transmission orders the places of an image by their haze, whatever its scale. A map that is the
    same everywhere orders nothing and has 0.
    """
    ranks = [_rank(values) for values in (found, truth)]
    centred = [values - values.mean() for values in ranks]
    spread = float(centred[0].norm() * centred[1].norm())
    return float((centred[0] * centred[1]).sum()) / spread if spread else 0.0


def _rank(values: Tensor) -> Tensor:
    """Rank values, float64; equal values share their mean rank."""
    _, places, counts = values.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]


# --- Any metric ---


def load_measure(name: str, weights: WeightsSource, device: torch.device | str = "cpu") -> Measure:
    """Load the metric `name` of `list_metrics`.

    Files that it needs come from `weights`. The returned function raises `Unmeasured`.

    Raises `WeightsError` where the weights are missing or hold anything but plain tensors, and `ValueError` for an
    unknown name.
    """
    if name not in list_metrics():
        raise ValueError(f"{name!r} is no metric of pictures")

    needs_truth = list_metrics()[name].needs_truth
    rate = _get_own_metric(name) if name in OWN_METRICS else _load_pyiqa_metric(name, weights, device)

    @torch.no_grad()
    def measure(picture: Tensor, truth: Tensor | None) -> float:
        """Measure one picture.

        Raises `Unmeasured` where the metric has no score for it.
        """
        if needs_truth:
            _check_truth(picture, truth)
        try:
            score = rate(picture, truth if needs_truth else None)
        except Exception as error:
            # Each metric has its own exceptions for pictures that it cannot rate.
            raise Unmeasured(format_error(error)) from None

        if score.numel() != 1:
            raise Unmeasured(f"{score.numel()} scores for one image")
        if score.isnan().any():
            raise Unmeasured("undefined for this image")
        return score.item()

    return measure


def _check_truth(picture: Tensor, truth: Tensor | None) -> None:
    """Check that a picture has a truth of its size.

    Raises `Unmeasured`.
    """
    if truth is None:
        raise Unmeasured("it has no truth")
    if truth.shape != picture.shape:
        found = f"{truth.shape[3]} x {truth.shape[2]} px"
        expected = f"{picture.shape[3]} x {picture.shape[2]}"
        raise Unmeasured(f"its truth is of another size ({found}, not {expected})")


def _get_own_metric(name: str) -> Rate:
    """Return one of this package's metrics."""
    if name == "fade":
        return lambda picture, _: fade(picture)
    compare = {"psnr": psnr, "ssim": ssim}[name]
    return lambda picture, truth: compare(picture, cast(Tensor, truth))


def _load_pyiqa_metric(name: str, weights: WeightsSource, device: torch.device | str) -> Rate:
    """Build one of pyiqa's metrics on `device`; raises `WeightsError`."""
    metric = build_metric(name, lambda url: weights(get_file_name(url))).to(device)

    def rate(picture: Tensor, truth: Tensor | None) -> Tensor:
        """Rate a picture in float32, also under autocast."""
        with torch.autocast(picture.device.type, enabled=False):
            return metric(picture.float()) if truth is None else metric(picture.float(), truth.float())

    return rate
