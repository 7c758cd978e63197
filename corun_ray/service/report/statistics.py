"""Statistics over images: means with bootstrap intervals, and a test of whether two models differ.

Both need scipy, which is imported on first use: importing it takes longer than most commands.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 9999
VALUES_AT_ONCE = 2**24
"""Resampled values in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval (percentile, 95 %), over images drawn alike."""

    mean: float
    low: float
    high: float
    count: int
    """Images that have a value. A single image has no interval (NaN)."""

    @property
    def span(self) -> str:
        """`low to high`; empty without an interval."""
        return "" if np.isnan(self.low) else f"{self.low:.4f} to {self.high:.4f}"


@dataclass(frozen=True)
class Comparison:
    """The first of two models compared with the second, image by image."""

    difference: Interval
    """Of first minus second."""
    better: int
    """Number of images on which the first is better."""
    p_value: float
    """Of the two-sided sign-flip test: the chance that noise alone gives a mean difference as large."""
    verdict: str
    """Of the first: `better`, `worse` or `no difference shown`."""


def describe_gap(value: float) -> str:
    """Describe a value that has no part in a mean: the PSNR of equal images is infinite."""
    return "infinite" if np.isinf(value) else "no value"


def estimate_interval(values: NDArray[np.float64]) -> Interval:
    """Estimate the mean and interval of the finite values, one an image."""
    from scipy import stats

    # Too few values for an interval.
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(finite.mean())
    if len(finite) == 1:
        return Interval(mean, np.nan, np.nan, 1)

    # A fixed seed: the same values always have the same interval.
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
    """Compare two models by their values of the same images.

    The values are in the same order. Images without a finite value of both are skipped. The verdict is the sign-flip
    test's; with five images or fewer the test can show no difference.
    """
    from scipy import stats

    difference = first - second
    difference = difference[np.isfinite(difference)]

    # Sign-flip test. Equal values show no difference, and the test is not defined for them.
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

    # The direction of a difference counts only if the test shows one.
    better = -difference if lower_better else difference
    verdict = "no difference shown"
    if p_value < 1 - CONFIDENCE:
        verdict = "better" if better.mean() > 0 else "worse"
    return Comparison(estimate_interval(difference), int((better > 0).sum()), p_value, verdict)
