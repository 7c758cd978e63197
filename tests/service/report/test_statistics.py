"""Intervals and verdicts, against what is known of the distributions they are drawn from."""

import numpy as np
import pytest

from corun_ray.service.report.statistics import compare, estimate_interval


def test_an_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(20, 3, 400)
    found = estimate_interval(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.count == 400
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.03)


def test_values_that_are_missing_or_infinite_are_left_out():
    found = estimate_interval(np.array([1.0, np.nan, 3.0, np.inf]))
    assert (found.mean, found.count) == (2.0, 2)
    assert estimate_interval(np.array([np.nan])).count == 0
    single = estimate_interval(np.array([5.0]))
    assert single.mean == 5 and np.isnan(single.low) and single.span == ""
    assert estimate_interval(np.array([1.0, 1.0])).span == "1.0000 to 1.0000"


@pytest.mark.parametrize(("lower_better", "verdict"), [(False, "better"), (True, "worse")])
def test_a_steady_difference_is_more_than_noise(lower_better, verdict):
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 5, 24)  # images differ far more than the models do
    found = compare(difficulty + rng.normal(0.3, 0.3, 24), difficulty, lower_better)
    assert found.verdict == verdict and found.p_value < 0.01
    assert found.difference.low > 0 and (found.better > 16) == (not lower_better)


def test_noise_is_called_a_difference_about_as_often_as_claimed():
    rng = np.random.default_rng(2)
    verdicts = [compare(rng.normal(0, 1, 12), np.zeros(12), False).verdict for _ in range(200)]
    assert 2 <= 200 - verdicts.count("no difference shown") <= 20


def test_few_images_show_nothing_and_six_can():
    assert compare(np.ones(5), np.zeros(5), False).verdict == "no difference shown"
    found = compare(np.arange(1.0, 7.0), np.zeros(6), False)
    assert found.verdict == "better" and found.p_value == pytest.approx(2 / 2**6)


def test_equal_models_do_not_differ_and_gaps_pair_up():
    values = np.array([1.0, 2.0, np.nan])
    found = compare(values, values, False)
    assert (found.verdict, found.p_value, found.better, found.difference.count) == ("no difference shown", 1.0, 0, 2)
    assert compare(np.array([np.nan]), np.array([1.0]), False).verdict == "no difference shown"
