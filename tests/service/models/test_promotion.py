"""When a version takes the champion's place, decided from held-out values alone."""

import numpy as np
import pytest

from corun_ray.service.models.registry import VersionScores, compare_means, decide

IMAGES = [f"{i}.png" for i in range(12)]
HELD_OUT = {"val": "abc"}
DIFFICULTY = np.random.default_rng(0).normal(2, 1, 12)


def record(label, shift, held_out=HELD_OUT, metric="val/fade", noise=0.05):
    values = DIFFICULTY + shift + np.random.default_rng(len(label)).normal(0, noise, 12)
    return VersionScores(label, {metric: dict(zip(IMAGES, values, strict=True))}, held_out)


def test_a_better_version_moves_and_a_worse_one_does_not():
    champion = record("version 1", 0.0)
    better, worse = (decide(record("version 22", shift), champion, "val/fade") for shift in (-0.2, 0.2))
    assert better.moves and better.reason.endswith(": better") and "of version 1" in better.reason
    assert not worse.moves and worse.reason.endswith(": worse") and "better on 0 of 12 images" in worse.reason


def test_the_direction_is_the_metrics():
    metric = "val/psnr"
    champion = record("version 1", 0.0, metric=metric)
    assert decide(record("version 22", 0.2, metric=metric), champion, metric).moves
    assert not decide(record("version 22", -0.2, metric=metric), champion, metric).moves


def test_what_could_be_noise_does_not_move():
    decision = decide(record("version 22", -0.02, noise=0.5), record("version 1", 0.0, noise=0.5), "val/fade")
    assert not decision.moves and decision.reason.endswith("no difference shown")


@pytest.mark.parametrize("held_out", [{}, {"val": "other"}, {"val/night": "abc"}])
def test_versions_measured_on_different_images_are_not_compared(held_out):
    decision = decide(record("version 22", -1.0, held_out), record("version 1", 0.0), "val/fade")
    assert not decision.moves and "different images" in decision.reason


def test_a_version_without_the_metric_is_named():
    bare = VersionScores("version 22", {}, HELD_OUT)
    assert decide(bare, record("version 1", 0.0), "val/fade").reason == (
        "version 22 was not measured by val/fade (it has nothing)"
    )
    decision = decide(
        record("version 22", 0.0, metric="val/psnr"), record("version 1", 0.0, metric="val/psnr"), "val/ssim"
    )
    assert not decision.moves and "it has val/psnr" in decision.reason


def test_an_image_without_a_finite_value_leaves_both_versions():
    new, old = record("version 22", 0.2, metric="val/psnr"), record("version 1", 0.0, metric="val/psnr")
    new.values["val/psnr"]["0.png"], old.values["val/psnr"]["1.png"] = np.inf, np.nan
    decision = decide(new, old, "val/psnr")
    assert decision.moves and "of 10 images" in decision.reason
    assert "inf" not in decision.reason and "nan" not in decision.reason
    assert decision.reason.endswith("(2 images left out, without a finite value of both)")


@pytest.mark.parametrize(("metric", "shift"), [("val/psnr", 0.02), ("val/brisque", -0.02)])
def test_the_best_version_is_the_one_with_the_better_mean(metric, shift):
    old = record("version 1", 0.0, metric=metric, noise=0)
    assert compare_means(record("version 2", shift, metric=metric, noise=0), old, metric).moves
    assert not compare_means(record("version 2", -shift, metric=metric, noise=0), old, metric).moves
    assert not compare_means(record("version 2", 0.0, metric=metric, noise=0), old, metric).moves


def test_a_version_that_cannot_be_compared_does_not_stay_the_best():
    new = record("version 2", -1.0, metric="val/psnr")
    for old, told in (
        (record("version 1", 0.0), "version 1, the best before, was not measured by val/psnr"),
        (record("version 1", 0.0, {"val": "other"}, "val/psnr"), "was measured on other images (val)"),
    ):
        decision = compare_means(new, old, "val/psnr")
        assert decision.moves and told in decision.reason
