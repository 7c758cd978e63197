"""Average precision: boxes made by hand whose value is known, and any draw of images as pycocotools has it."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from corun_ray.core.metrics.detection import (
    IOU_THRESHOLDS,
    Boxes,
    Detections,
    build_found_dataset,
    build_truth_dataset,
    compute_average_precision,
    compute_table,
    merge_rankings,
    rank_detections,
)

CAR, BUS = 3, 6
LEFT, RIGHT, FAR = (10, 10, 50, 40), (100, 20, 180, 90), (300, 300, 340, 340)


def boxes(*corners: Sequence[float], label: int = CAR, difficult: Sequence[bool] = ()) -> Boxes:
    flags = np.array(difficult or [False] * len(corners), bool)
    return Boxes(np.array(corners, float).reshape(-1, 4), np.full(len(corners), label), flags)


def found(*scored: tuple[float, Sequence[float]], label: int = CAR) -> Detections:
    corners = np.array([one for _, one in scored], float).reshape(-1, 4)
    return Detections(corners, np.full(len(scored), label), np.array([score for score, _ in scored]))


def measure(truths: list[Boxes], detections: list[Detections], labels: Sequence[int] = (CAR,)) -> NDArray[np.float64]:
    return compute_table(rank_detections(truths, detections, labels), np.ones(len(truths)))


@pytest.mark.parametrize(
    ("truth", "detections", "ap50", "ap"),
    [
        (boxes(LEFT, RIGHT), found((0.9, LEFT), (0.8, RIGHT)), 1.0, 1.0),
        # Half of the boxes: precision is 1 at the 51 recalls up to 0.5.
        (boxes(LEFT, RIGHT), found((0.9, LEFT)), 51 / 101, 51 / 101),
        # A wrong one before the right one, and behind it.
        (boxes(LEFT), found((0.9, FAR), (0.8, LEFT)), 0.5, 0.5),
        (boxes(LEFT), found((0.8, FAR), (0.9, LEFT)), 1.0, 1.0),
        # The second detection of a box is wrong.
        (boxes(LEFT, RIGHT), found((0.9, LEFT), (0.8, LEFT), (0.7, RIGHT)), (51 + 50 * 2 / 3) / 101, None),
        # An overlap of 0.6 is enough at 0.5, 0.55 and 0.6.
        (boxes((0, 0, 100, 100)), found((0.9, (0, 0, 60, 100))), 1.0, 0.3),
        # A difficult box: what lies in it does not count, and nobody misses it.
        (boxes(LEFT, FAR, difficult=[False, True]), found((0.9, FAR), (0.8, LEFT)), 1.0, 1.0),
        (boxes(LEFT, FAR, difficult=[False, True]), found((0.8, LEFT)), 1.0, 1.0),
        (boxes(LEFT), found(), 0.0, 0.0),
        (boxes(LEFT), found((0.9, LEFT), label=BUS), 0.0, 0.0),
    ],
)
def test_known_values(truth: Boxes, detections: Detections, ap50: float, ap: float | None) -> None:
    table = measure([truth], [detections])
    assert table[1] == pytest.approx([ap50, ap50 if ap is None else ap], abs=1e-9)
    assert table[0] == pytest.approx(table[1])


def test_scores_are_ranked_over_all_images() -> None:
    # The wrong box of the second image is the best of all: precision 1/2, then 2/3.
    table = measure([boxes(LEFT), boxes(RIGHT)], [found((0.5, LEFT)), found((0.9, FAR), (0.4, RIGHT))])
    assert table[1, 0] == pytest.approx(2 / 3)


def test_the_mean_leaves_out_classes_without_boxes() -> None:
    truths, detections = [boxes(LEFT), boxes(RIGHT, label=BUS)], [found((0.9, LEFT)), found((0.9, FAR), label=BUS)]
    table = measure(truths, detections, (1, CAR, BUS))
    assert np.isnan(table[1]).all()
    assert table[[0, 2, 3], 0] == pytest.approx([0.5, 1.0, 0.0])


def make_scenes(seed: int, num_images: int = 30) -> tuple[list[Boxes], list[Detections]]:
    """Random boxes of two classes, some difficult, and detections near some of them and anywhere."""
    rng = np.random.default_rng(seed)

    def place(count: int) -> NDArray[np.float64]:
        corner = rng.uniform(0, 200, (count, 2))
        return np.concatenate([corner, corner + rng.uniform(10, 120, (count, 2))], axis=1)

    truths, detections = [], []
    for _ in range(num_images):
        true_corners = place(rng.integers(0, 6))
        labels = rng.choice([CAR, BUS], len(true_corners))
        truths.append(Boxes(true_corners, labels, rng.random(len(labels)) < 0.2))
        near = true_corners + rng.normal(0, 6, true_corners.shape)
        others = place(rng.integers(0, 8))
        corners = np.concatenate([near, others])
        all_labels = np.concatenate([labels, rng.choice([CAR, BUS], len(others))])
        detections.append(Detections(corners, all_labels, rng.random(len(corners))))
    return truths, detections


def accumulate_by_pycocotools(truths: list[Boxes], detections: list[Detections]) -> NDArray[np.float64]:
    """AP as pycocotools computes it by itself, thresholds x classes, with all its area ranges and limits."""
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for dataset in (build_truth_dataset(truths, [CAR, BUS]), build_found_dataset(detections, [CAR, BUS])):
            coco = COCO()
            coco.dataset = dataset
            coco.createIndex()
            sides.append(coco)
        evaluation = COCOeval(*sides, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_any_draw_of_images_has_the_value_of_pycocotools(seed: int) -> None:
    truths, detections = make_scenes(seed)
    rankings = rank_detections(truths, detections, [CAR, BUS])
    for times in (np.ones(30), np.bincount(np.random.default_rng(seed).integers(30, size=30), minlength=30)):
        drawn = np.repeat(np.arange(30), times.astype(int))
        expected = accumulate_by_pycocotools([truths[i] for i in drawn], [detections[i] for i in drawn])
        values = [compute_average_precision(ranking, times.astype(float)) for ranking in rankings]
        np.testing.assert_allclose(np.stack(values, axis=1), expected, atol=1e-12)
        assert 0.1 < expected[0].min() < 0.9 and len(expected) == len(IOU_THRESHOLDS)


def test_the_images_of_two_rankings_are_kept_apart() -> None:
    first, second = ([*rank_detections(*make_scenes(seed), [CAR])] for seed in (1, 2))
    merged = [merge_rankings(first[0], second[0])]
    ones, zeros = np.ones(30), np.zeros(30)
    for ranking, times in ((first, [ones, zeros]), (second, [zeros, ones])):
        np.testing.assert_allclose(compute_table(merged, np.concatenate(times)), compute_table(ranking, ones))
