"""Full-reference metrics."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
