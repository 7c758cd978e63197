"""The losses against numbers worked out by hand, and what they teach."""

import pytest
import torch
from torch import Tensor

from corun_ray.core.corun import Restoration
from corun_ray.core.losses import colabator_losses, pretraining_losses, rehaze


def filled(*values: float) -> Tensor:
    """One image of 3 channels with these pixels in a row."""
    return torch.tensor(values).expand(1, 3, 1, len(values)).clone()


def channel(*values: float) -> Tensor:
    return filled(*values)[:, :1].clone()


def test_rehaze_is_the_scattering_model_with_white_airlight() -> None:
    hazy = rehaze(Restoration(filled(0.2, 0.2, 0.2), channel(1, 0.5, 0)))
    torch.testing.assert_close(hazy, filled(0.2, 0.6, 1.0))


def test_pretraining_by_hand() -> None:
    # Errors of the scene 0.3 and 0.7 (not clamped); rehazed 0.75 and 1.15, so 0.25 and 0.65 from the hazy image.
    restoration = Restoration(filled(0.5, 1.3), channel(0.5, 0.5))
    losses = pretraining_losses(restoration, clear=filled(0.2, 0.6), hazy=filled(0.5, 0.5))
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"pixel": 0.5, "scattering": 0.01 * 0.45}, rel=1e-5
    )


def colabator_example() -> tuple[dict[str, Tensor], Restoration, Restoration, dict[str, Tensor]]:
    synthetic = Restoration(filled(0.5, 1.4), channel(0.5, 0.5))
    real = Restoration(filled(0.5, 1.2), channel(0.5, 0.25))
    targets = {
        "clear": filled(0.2, 0.6),
        "hazy_strong": filled(0.5, 0.5),
        "label": filled(0.9, 0.2),
        "trust": channel(0.5, 0.1),
    }
    for tensor in (*synthetic, *real, *targets.values()):
        tensor.requires_grad_()
    losses = colabator_losses(synthetic=synthetic, real=real, **targets)
    return losses, synthetic, real, targets


def test_colabator_by_hand() -> None:
    losses, *_ = colabator_example()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {
            # |0.5 - 0.2| and, clamped, |1 - 0.6|.
            "pixel_synthetic": 5 * (0.5 * 0.3 + 0.5 * 0.4) / 2,
            # |0.5 - 0.9| and, not clamped, |1.2 - 0.2|, times the trust and 2.
            "pixel_real": 5 * (0.5 * 0.4 * 0.5 * 2 + 0.5 * 1.0 * 0.1 * 2) / 2,
            # Rehazed 0.75 and 1.05, against 0.5.
            "scattering": 0.01 * (0.5 * 0.25 * 0.5 + 0.5 * 0.55 * 0.1) / 2,
        },
        rel=1e-5,
    )


def test_only_the_synthetic_scene_is_clamped() -> None:
    losses, synthetic, real, _ = colabator_example()
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert synthetic.scene.grad is not None and real.scene.grad is not None
    assert (synthetic.scene.grad[..., 0] > 0).all()
    assert (synthetic.scene.grad[..., 1] == 0).all(), "1.4 is beyond the clamp"
    assert (real.scene.grad != 0).all()


def test_the_scattering_loss_teaches_scene_and_transmission_of_the_real_half() -> None:
    losses, synthetic, real, targets = colabator_example()
    losses["scattering"].backward()
    assert real.scene.grad is not None and real.transmission.grad is not None
    # Rehazed is too bright: a darker scene, and a larger transmission where the scene is dark, would help.
    assert (real.scene.grad > 0).all()
    assert real.transmission.grad[0, 0, 0, 0] < 0 < real.transmission.grad[0, 0, 0, 1]
    assert synthetic.scene.grad is None and synthetic.transmission.grad is None
    assert targets["clear"].grad is None and targets["label"].grad is None


def test_no_trust_is_no_lesson() -> None:
    real = Restoration(filled(0.5, 0.5).requires_grad_(), channel(0.5, 0.5).requires_grad_())
    losses = colabator_losses(real, filled(0, 0), real, filled(0.3, 0.3), filled(0.9, 0.9), channel(0, 0))
    assert losses["pixel_real"].item() == losses["scattering"].item() == 0
    assert losses["pixel_synthetic"].item() > 0
