"""Means and comparisons are over the same images in every row."""

import numpy as np
import pytest

from corun_ray.service.inference.measurements import Measurements

IMAGES = [f"{i}.png" for i in range(8)]


@pytest.fixture
def measured():
    """Eight images under three models; one value is infinite and one missing, each under another model."""
    values = np.random.default_rng(0).uniform(10, 20, (8, 3, 2))
    values[2, 0, 0] = np.inf
    values[5, 1, 0] = np.nan
    return Measurements(IMAGES, ["hazy", "ours", "theirs"], ["psnr", "fade"], values)


def test_an_image_that_one_row_lacks_leaves_every_row(measured):
    intervals = measured.estimate_intervals()
    kept = [0, 1, 3, 4, 6, 7]
    for row, model in enumerate(measured.models):
        psnr, fade = intervals[model]["psnr"], intervals[model]["fade"]
        assert psnr.count == 6 and psnr.mean == pytest.approx(measured.values[kept, row, 0].mean())
        assert fade.count == 8 and fade.mean == pytest.approx(measured.values[:, row, 1].mean())
    comparison = measured.compare_with("ours")["theirs"]["psnr"]
    assert comparison.difference.count == 6
    assert comparison.difference.mean == pytest.approx(
        intervals["theirs"]["psnr"].mean - intervals["ours"]["psnr"].mean
    )


def test_what_is_left_out_is_told_with_its_reason(measured):
    assert measured.describe_left_out() == [
        "psnr: 2 of 8 images left out of every mean: 2.png (hazy: infinite), 5.png (ours: no value)"
    ]
    assert measured.describe_images() == "8 images (psnr 6)"
    measured.values[:, 2, 1] = np.nan
    (_, fade) = measured.describe_left_out()
    assert fade.startswith("fade: 8 of 8 images left out") and fade.endswith("4.png (theirs: no value), 3 more")
    assert measured.estimate_intervals()["ours"]["fade"].count == 0


def test_the_table_keeps_raw_values(measured):
    table = measured.to_table().to_pylist()
    assert table[6]["psnr"] == np.inf and table[16]["psnr"] is None
