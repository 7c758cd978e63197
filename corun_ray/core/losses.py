"""Training losses with the published weights (Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.3)."""

from torch import Tensor

from corun_ray.core.corun import Restoration

SCATTERING_WEIGHT = 0.01
PIXEL_WEIGHT = 5.0


def rehaze(restoration: Restoration) -> Tensor:
    """The hazy image that a restoration explains, `J T + 1 - T` (airlight 1), B 3 H W."""
    scene, transmission = restoration
    return scene * transmission + 1 - transmission


def pretraining_losses(restoration: Restoration, clear: Tensor, hazy: Tensor) -> dict[str, Tensor]:
    """Supervised losses on a synthetic pair; `clear` and `hazy` B 3 H W in [0, 1]. Their sum is minimised."""
    return {
        "pixel": (restoration.scene - clear).abs().mean(),
        "scattering": SCATTERING_WEIGHT * (rehaze(restoration) - hazy).abs().mean(),
    }


def colabator_losses(
    synthetic: Restoration,
    clear: Tensor,
    real: Restoration,
    hazy_strong: Tensor,
    label: Tensor,
    trust: Tensor,
) -> dict[str, Tensor]:
    """The student's losses on a synthetic and on a real half-batch. Their sum is minimised.

    `clear`, `hazy_strong` (the strong view that `real` restores) and `label` (J*) B 3 H W, `trust` (w*)
    B 1 H W; all in [0, 1].
    """
    synthetic_error = (synthetic.scene.clamp(0, 1) - clear).abs()
    real_error = (real.scene - label).abs()
    return {
        "pixel_synthetic": PIXEL_WEIGHT * 0.5 * synthetic_error.mean(),
        "pixel_real": PIXEL_WEIGHT * 0.5 * (2 * trust * real_error).mean(),
        "scattering": SCATTERING_WEIGHT * 0.5 * (trust * (rehaze(real) - hazy_strong).abs()).mean(),
    }
