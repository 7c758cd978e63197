"""The losses against numbers worked out by hand, and what they teach."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.networks.corun import Restoration
from corun_ray.core.training.losses import (
    COLABATOR_WEIGHTS,
    PRETRAIN_WEIGHTS,
    Losses,
    LossWeights,
    Vgg19Features,
    rehaze,
)

NO_WEIGHTS = LossWeights(0, 0, 0, 0)
LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)


class CountingFeatures(Vgg19Features):
    """VGG-19 with random weights; remembers each pass: how many images, and whether with a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                torch.nn.init.normal_(parameter, std=1.4 / parameter[0].numel() ** 0.5)
        self.requires_grad_(False).eval()
        self.passes: list[tuple[int, bool]] = []

    def forward(self, images: Tensor) -> list[Tensor]:
        self.passes.append((len(images), torch.is_grad_enabled()))
        return super().forward(images)


@pytest.fixture(scope="module")
def vgg() -> CountingFeatures:
    return CountingFeatures()


@pytest.fixture
def features(vgg: CountingFeatures) -> CountingFeatures:
    vgg.passes.clear()
    return vgg


def pictures(count: int, seed: int, size_px: int = 32) -> Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(seed))


def filled(*values: float) -> Tensor:
    """One image of 3 channels with these pixels in a row."""
    return torch.tensor(values).expand(1, 3, 1, len(values)).clone()


def channel(*values: float) -> Tensor:
    return filled(*values)[:, :1].clone()


def test_rehaze_is_the_scattering_model_with_white_airlight() -> None:
    hazy = rehaze(Restoration(filled(0.2, 0.2, 0.2), channel(1, 0.5, 0)))
    torch.testing.assert_close(hazy, filled(0.2, 0.6, 1.0))
    with pytest.raises(ValueError, match="without a transmission"):
        rehaze(Restoration(filled(0.2), None))


def test_pretraining_by_hand() -> None:
    # Errors of the scene 0.3 and 0.7 (not clamped); rehazed 0.75 and 1.15, so 0.25 and 0.65 from the hazy image.
    restoration = Restoration(filled(0.5, 1.3), channel(0.5, 0.5))
    losses = Losses(PRETRAIN_WEIGHTS).compute_pretraining(restoration, clear=filled(0.2, 0.6), hazy=filled(0.5, 0.5))
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"pixel": 0.5, "scattering": 0.01 * 0.45}, rel=1e-5
    )


def test_the_distance_of_the_transmission_to_its_truth_by_hand() -> None:
    restoration = Restoration(filled(0.5, 0.5), channel(0.5, 0.9))
    images = filled(0.5, 0.5)
    losses = Losses(replace(NO_WEIGHTS, transmission=0.2))
    truth = channel(0.2, 0.8)
    assert losses.compute_pretraining(restoration, images, images, truth)["transmission"].item() == pytest.approx(0.04)
    synthetic = losses.compute_colabator(
        restoration, images, Restoration(images, None), images, images, images[:, :1], truth
    )
    assert {name: loss.item() for name, loss in synthetic.items()} == pytest.approx({"transmission": 0.04})
    # Nothing to compare with: no truth, or no transmission.
    assert losses.compute_pretraining(restoration, images, images) == {}
    assert losses.compute_pretraining(Restoration(images, None), images, images, truth) == {}


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
        assert tensor is not None
        tensor.requires_grad_()
    losses = Losses(COLABATOR_WEIGHTS).compute_colabator(synthetic=synthetic, real=real, **targets)
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
    assert real.transmission is not None and synthetic.transmission is not None
    assert real.scene.grad is not None and real.transmission.grad is not None
    # Rehazed is too bright: a darker scene, and a larger transmission where the scene is dark, would help.
    assert (real.scene.grad > 0).all()
    assert real.transmission.grad[0, 0, 0, 0] < 0 < real.transmission.grad[0, 0, 0, 1]
    assert synthetic.scene.grad is None and synthetic.transmission.grad is None
    assert targets["clear"].grad is None and targets["label"].grad is None


def test_no_trust_is_no_lesson() -> None:
    real = Restoration(filled(0.5, 0.5).requires_grad_(), channel(0.5, 0.5).requires_grad_())
    losses = Losses(COLABATOR_WEIGHTS).compute_colabator(
        real, filled(0, 0), real, filled(0.3, 0.3), filled(0.9, 0.9), channel(0, 0)
    )
    assert losses["pixel_real"].item() == losses["scattering"].item() == 0
    assert losses["pixel_synthetic"].item() > 0


def perceptual_by_hand(features: Vgg19Features, x: Tensor, y: Tensor) -> Tensor:
    pairs = zip(LAYER_WEIGHTS, features(x), features(y.detach()), strict=True)
    return 0.2 * torch.stack([w * F.l1_loss(a, b) for w, a, b in pairs]).sum()


def contrastive_by_hand(features: Vgg19Features, x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    layers = zip(LAYER_WEIGHTS, features(x), features(positive.detach()), features(negative.detach()), strict=True)
    return 0.2 * torch.stack([w * F.l1_loss(a, p) / F.l1_loss(a, n) for w, a, p, n in layers]).sum()


def test_pretraining_pushes_from_the_hazy_image_to_the_clear_one(features: CountingFeatures) -> None:
    scene, clear, hazy = pictures(2, 0).requires_grad_(), pictures(2, 1), pictures(2, 2)
    losses = Losses(replace(PRETRAIN_WEIGHTS, perceptual=0.3), features).compute_pretraining(
        Restoration(scene, None), clear, hazy
    )
    assert list(losses) == ["pixel", "perceptual", "contrastive"]
    assert features.passes == [(2, True), (4, False)], "both terms share the scene and the clear image"
    expected = 0.3 * perceptual_by_hand(features, scene, clear), contrastive_by_hand(features, scene, clear, hazy)
    torch.testing.assert_close((losses["perceptual"], losses["contrastive"]), expected)

    assert Losses(PRETRAIN_WEIGHTS).compute_pretraining(Restoration(scene, None), clear, hazy).keys() == {"pixel"}


def test_colabator_s_feature_losses_and_their_gradients_are_those_of_term_by_term(features: CountingFeatures) -> None:
    synthetic, real = (2 * pictures(count, count) - 0.5 for count in (1, 2))  # beyond [0, 1]: clamping shows
    clear, hazy, label = pictures(1, 3), pictures(2, 4), pictures(2, 5)
    scenes = [synthetic.requires_grad_(), real.requires_grad_()]

    losses = Losses(replace(COLABATOR_WEIGHTS, pixel=0, scattering=0), features).compute_colabator(
        Restoration(synthetic, None), clear, Restoration(real, None), hazy, label, torch.ones(2, 1, 32, 32)
    )
    assert list(losses) == ["perceptual", "contrastive"]
    assert features.passes == [(3, True), (5, False)]
    expected = {
        "perceptual": 0.2 * perceptual_by_hand(features, synthetic.clamp(0, 1), clear),
        "contrastive": contrastive_by_hand(features, real, label, hazy),
    }
    torch.testing.assert_close(losses, expected)
    ours = torch.autograd.grad(losses["perceptual"] + losses["contrastive"], scenes)
    theirs = torch.autograd.grad(expected["perceptual"] + expected["contrastive"], scenes)
    assert all(gradient.abs().max() > 0 for gradient in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("weights", "passes"),
    [
        (replace(NO_WEIGHTS, pixel=1), []),
        (replace(NO_WEIGHTS, perceptual=1), [(1, True), (1, False)]),
        (replace(NO_WEIGHTS, contrastive=1), [(2, True), (4, False)]),
    ],
)
def test_no_feature_is_computed_that_no_term_needs(
    features: CountingFeatures, weights: LossWeights, passes: list[tuple[int, bool]]
) -> None:
    synthetic, real = (Restoration(pictures(count, count), None) for count in (1, 2))
    Losses(weights, features).compute_colabator(
        synthetic, pictures(1, 3), real, pictures(2, 4), pictures(2, 5), torch.ones(2, 1, 32, 32)
    )
    assert features.passes == passes


def test_a_term_of_weight_0_is_not_listed() -> None:
    one = Restoration(filled(0.5, 0.5), channel(0.5, 0.5))
    targets = filled(0, 0), one, filled(0.3, 0.3), filled(0.9, 0.9), channel(1, 1)
    assert Losses(NO_WEIGHTS).compute_colabator(one, *targets) == {}
    assert Losses(NO_WEIGHTS).compute_pretraining(one, filled(0, 0), filled(1, 1)) == {}
    assert Losses(replace(NO_WEIGHTS, scattering=1)).compute_colabator(one, *targets).keys() == {"scattering"}


def test_features_of_few_bits_still_make_a_loss_of_many(features: CountingFeatures) -> None:
    scene, clear, hazy = pictures(1, 0).requires_grad_(), pictures(1, 1), pictures(1, 2)
    losses = Losses(PRETRAIN_WEIGHTS, features)
    exact = losses.compute_pretraining(Restoration(scene, None), clear, hazy)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = losses.compute_pretraining(Restoration(scene.bfloat16(), None), clear, hazy)
    assert all(loss.dtype == torch.float32 for loss in coarse.values())
    torch.testing.assert_close(coarse, exact, rtol=0.03, atol=0)


def test_an_image_that_was_left_as_it_is_has_a_finite_contrastive_loss(features: CountingFeatures) -> None:
    hazy = pictures(1, 2).requires_grad_()
    losses = Losses(PRETRAIN_WEIGHTS, features).compute_pretraining(
        Restoration(hazy, None), pictures(1, 1), hazy.detach()
    )
    losses["contrastive"].backward()
    assert losses["contrastive"].isfinite() and hazy.grad is not None and hazy.grad.isfinite().all()


def test_haze_density_is_optional_and_teaches() -> None:
    def density(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    scene = torch.cat([filled(0.2, 1.4), filled(0.4, -1)]).requires_grad_()
    targets = torch.zeros(2, 3, 1, 2)
    assert "haze_density" not in Losses(COLABATOR_WEIGHTS, None, density).compute_pretraining(
        Restoration(scene, None), targets, targets
    )
    losses = Losses(replace(NO_WEIGHTS, haze_density=2), None, density)
    found = losses.compute_pretraining(Restoration(scene, None), targets, targets)
    assert found["haze_density"].item() == pytest.approx(2 * ((0.2 + 1) / 2 + 0.4 / 2) / 2)
    found["haze_density"].backward()
    assert scene.grad is not None
    assert (scene.grad[..., 0] > 0).all() and (scene.grad[..., 1] == 0).all(), "beyond the clamp"
    other = Restoration(torch.ones(1, 3, 1, 2), None)
    real = losses.compute_colabator(other, targets[:1], Restoration(scene, None), targets, targets, targets[:, :1])
    torch.testing.assert_close(real, found)
