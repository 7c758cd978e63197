"""What a number of images can show: means with bootstrap intervals, and whether two models truly differ on them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 9999
VALUES_AT_ONCE = 2**24
"""Resampled values in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean and the bootstrap interval (percentile, 95 %) of what other images of the kind would have given."""

    mean: float
    low: float
    high: float
    count: int
    """Images that have a value; of a single one, there is no interval (NaN)."""

    @property
    def span(self) -> str:
        """`low to high`; empty where there is no interval."""
        return "" if np.isnan(self.low) else f"{self.low:.4f} to {self.high:.4f}"


@dataclass(frozen=True)
class Comparison:
    """One model less another, image by image."""

    difference: Interval
    better: int
    """Images on which the first is better."""
    p_value: float
    """Of the two-sided sign-flip test: how often noise alone would give a mean difference as large."""
    verdict: str
    """`better`, `worse` or `no difference shown`, of the first."""


def estimate_interval(values: NDArray[np.float64]) -> Interval:
    """Of the finite ones among the values of all images."""
    from scipy import stats

    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(finite.mean())
    if len(finite) == 1:
        return Interval(mean, np.nan, np.nan, 1)
    found = stats.bootstrap(
        (finite,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, VALUES_AT_ONCE // len(finite)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = map(float, found.confidence_interval)
    return Interval(mean, low, high, len(finite))


def compare(first: NDArray[np.float64], second: NDArray[np.float64], lower_better: bool) -> Comparison:
    """Two models' values of the same images, in the same order; images on which either has none are left out.

    The verdict is the sign-flip test's: with five images or fewer it can show nothing, as it should.
    """
    from scipy import stats

    difference = first - second
    difference = difference[np.isfinite(difference)]
    better = -difference if lower_better else difference
    p_value = 1.0
    if np.any(difference):
        test = stats.permutation_test(
            (difference,),
            np.mean,
            permutation_type="samples",
            n_resamples=RESAMPLES,
            batch=max(1, VALUES_AT_ONCE // len(difference)),
            rng=np.random.default_rng(0),
        )
        p_value = float(test.pvalue)
    verdict = "no difference shown"
    if p_value < 1 - CONFIDENCE:
        verdict = "better" if better.mean() > 0 else "worse"
    return Comparison(estimate_interval(difference), int((better > 0).sum()), p_value, verdict)
