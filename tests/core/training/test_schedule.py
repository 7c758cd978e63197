"""The learning rate against values worked out by hand."""

import math

import pytest

from corun_ray.core.training.state import Cycle, compute_learning_rate

PUBLISHED = [Cycle(50_000, 5e-5, 1e-6)]
RESTARTS = [Cycle(10, 1.0, 0.2), Cycle(20, 0.5, 0.1)]


def test_one_cycle_is_the_published_cosine() -> None:
    assert compute_learning_rate(0, PUBLISHED) == 5e-5
    assert compute_learning_rate(25_000, PUBLISHED) == pytest.approx((5e-5 + 1e-6) / 2)
    assert compute_learning_rate(5_000, PUBLISHED) == pytest.approx(4.8800e-05, rel=1e-4)
    assert compute_learning_rate(50_000, PUBLISHED) == compute_learning_rate(80_000, PUBLISHED) == 1e-6
    rates = [compute_learning_rate(step, PUBLISHED) for step in range(0, 50_001, 500)]
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


@pytest.mark.parametrize(("lr", "min_lr", "steps"), [(5e-5, 1e-6, 50_000), (1e-4, 0.0, 7), (3e-4, 1e-5, 977)])
def test_one_cycle_gives_the_rates_of_runs_before_there_were_cycles(lr: float, min_lr: float, steps: int) -> None:
    for step in range(0, 2 * steps, max(1, steps // 97)):
        progress = min(step / steps, 1.0)
        before = min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        assert compute_learning_rate(step, [Cycle(steps, lr, min_lr)]) == before


def test_the_rate_is_constant_where_both_ends_are_equal() -> None:
    steps = (0, 1, 12_345, 30_000, 99_999)
    assert {compute_learning_rate(step, [Cycle(30_000, 1e-4, 1e-4)]) for step in steps} == {1e-4}


def test_every_cycle_starts_at_its_own_rate() -> None:
    rates = [compute_learning_rate(step, RESTARTS) for step in range(40)]
    assert (rates[0], rates[10]) == (1.0, 0.5)
    assert rates[5] == pytest.approx(0.6) and rates[20] == pytest.approx(0.3)
    assert 0.2 < rates[9] < rates[8] and 0.1 < rates[29] < rates[28]
    assert set(rates[30:]) == {0.1}


def test_warm_up_is_a_factor_on_the_schedule() -> None:
    constant = [Cycle(10, 0.8, 0.8)]
    rates = [compute_learning_rate(step, constant, warmup_steps=4) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    for step in range(35):
        factor = min(1, (step + 1) / 12)  # longer than the first cycle: the restart stays where it was
        assert compute_learning_rate(step, RESTARTS, 12) == pytest.approx(
            factor * compute_learning_rate(step, RESTARTS)
        )


def test_a_schedule_of_no_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one cycle expected"):
        compute_learning_rate(0, [])
