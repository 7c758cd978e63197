"""Mixup: what is mixed with what, how much, and that a seed says so."""

import numpy as np
import pytest
import torch

from corun_ray.core.training.steps import SyntheticBatch, apply_mixup

COUNT = 6


def corners() -> SyntheticBatch:
    """Image i is 1 in pixel i and 0 elsewhere, so that a mix shows its shares; hazy is half as bright."""
    clear = torch.eye(COUNT).view(COUNT, 1, 1, COUNT).expand(COUNT, 3, 1, COUNT).clone()
    return SyntheticBatch(0.5 * clear, clear)


def shares(seed: int, alpha: float = 0.7) -> np.ndarray:
    """Row i: how much of every image is in the mix i."""
    return apply_mixup(corners(), alpha, (seed,)).clear[:, 0, 0].numpy()


def test_each_image_is_mixed_with_one_other_and_its_truth_alike() -> None:
    for seed in range(20):
        mixed = apply_mixup(corners(), 0.7, (1, seed))
        torch.testing.assert_close(mixed.hazy, 0.5 * mixed.clear)
        rows = mixed.clear[:, 0, 0].numpy()
        np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)
        own = rows.diagonal()
        others = rows - np.diag(own)
        assert ((others > 0).sum(1) <= 1).all() and ((others > 0).sum(0) <= 1).all(), "a permutation"


def test_every_image_draws_its_own_share_from_the_beta_distribution() -> None:
    drawn = []
    for seed in range(2000):
        rows = shares(seed)
        own = rows.diagonal()
        drawn.append(own[own < 1 - 1e-6])
    assert len(set(np.round(drawn[0], 5))) == len(drawn[0]), "one share an image"
    found = np.concatenate(drawn)
    assert found.mean() == pytest.approx(0.5, abs=0.015)
    assert found.var() == pytest.approx(1 / (4 * (2 * 0.7 + 1)), rel=0.06)  # of Beta(0.7, 0.7)


def test_a_seed_says_all() -> None:
    first, again = apply_mixup(corners(), 0.7, (3, 14)), apply_mixup(corners(), 0.7, (3, 14))
    assert torch.equal(first.hazy, again.hazy) and torch.equal(first.clear, again.clear)
    assert not torch.equal(first.clear, apply_mixup(corners(), 0.7, (3, 15)).clear)


def test_a_lone_image_stays_as_it_is() -> None:
    clear = torch.rand(1, 3, 8, 8)
    mixed = apply_mixup(SyntheticBatch(clear, clear), 1.2, (0,))
    torch.testing.assert_close(mixed.clear, clear)
    assert mixed.clear.dtype == torch.float32
