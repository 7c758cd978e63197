"""Measuring a picture: PSNR, SSIM and FADE by this package, any other metric by pyiqa from weights on this machine.

Full-reference metrics."""

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


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of B 3 H W in [0, 1], over all pixels and channels → B; inf if equal."""
    return -10 * (images - truth).square().flatten(1).mean(1).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al., IEEE TIP 2004) of B 3 H W in [0, 1], mean over channels → B.

    An 11 px Gaussian window of sigma 1.5 and only positions where it fits: sides of at least 11 px.
    """
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=torch.float64, device=images.device) - SSIM_WINDOW_PX // 2
    taps = torch.exp(-offsets.square() / (2 * SSIM_SIGMA_PX**2))
    taps = taps / taps.sum()

    def blur(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, taps[None, None, :, None]), taps[None, None, None, :]).view(len(x), -1)

    x, y = images.double(), truth.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean(1).float()


Measure = Callable[[Tensor, Tensor | None], float]
"""A picture and its truth, both 1 3 H W in [0, 1] (the truth may be None), to the metric's own score."""


class Unmeasured(ValueError):
    """A picture that a metric has no score for; the message is the reason, one line."""


def load_measure(name: str, weights: WeightsSource, device: torch.device | str = "cpu") -> Measure:
    """The metric `name` of `list_metrics`, with the files that it needs from `weights`.

    What it returns raises `Unmeasured`. Raises `WeightsError` where the weights are missing or hold anything but
    plain tensors, and `ValueError` for an unknown name.
    """
    if name not in list_metrics():
        raise ValueError(f"{name!r} is no metric of pictures")
    needs_truth = list_metrics()[name].needs_truth
    rate = _own(name) if name in OWN_METRICS else _of_pyiqa(name, weights, device)

    @torch.no_grad()
    def measure(picture: Tensor, truth: Tensor | None) -> float:
        if needs_truth and truth is None:
            raise Unmeasured("it has no truth")
        if needs_truth and truth is not None and truth.shape != picture.shape:
            sizes = [f"{shape[3]} x {shape[2]}" for shape in (truth.shape, picture.shape)]
            raise Unmeasured(f"its truth is of another size ({sizes[0]} px, not {sizes[1]})")
        try:
            score = rate(picture, truth if needs_truth else None)
        except Exception as error:  # each metric refuses in its own way what it cannot rate
            raise Unmeasured(format_error(error)) from None
        if score.numel() != 1:
            raise Unmeasured(f"{score.numel()} scores for one image")
        if score.isnan().any():
            raise Unmeasured("undefined for this image")
        return score.item()

    return measure


def _own(name: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    if name == "fade":
        return lambda picture, _: fade(picture)
    compare = {"psnr": psnr, "ssim": ssim}[name]
    return lambda picture, truth: compare(picture, cast(Tensor, truth))


def _of_pyiqa(
    name: str, weights: WeightsSource, device: torch.device | str
) -> Callable[[Tensor, Tensor | None], Tensor]:
    metric = build_metric(name, lambda url: weights(get_file_name(url))).to(device)

    def rate(picture: Tensor, truth: Tensor | None) -> Tensor:
        with torch.autocast(picture.device.type, enabled=False):
            return metric(picture.float()) if truth is None else metric(picture.float(), truth.float())

    return rate
