"""Average precision of detected boxes, as COCO defines it.

pycocotools decides which detection finds which box; it is imported on first use. What it has decided is kept, so that
precision over any draw of the images costs little.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps (intersection over union) from which on a box counts as found."""
RECALLS = np.linspace(0, 1, 101)
"""Recalls at which precision is read."""
MAX_DETECTIONS = 100
"""Detections of one class in one image that count, best score first."""
AREA_RANGE_PX = [0, 1e10]
"""All areas: COCO's own range `all`."""


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image that are to be found."""

    corners: NDArray[np.float64]
    """N 4: left, top, right, bottom in pixels from the image's upper left corner."""
    labels: NDArray[np.int64]
    """N: the detector's number of each class."""
    difficult: NDArray[np.bool_]
    """N: regions in which detections count neither as right nor as wrong."""


@dataclass(frozen=True)
class Detections:
    """Boxes that a detector found in one image."""

    corners: NDArray[np.float64]
    """N 4, as of `Boxes`."""
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """All detections of one class, best score first, and whether each was right."""

    images: NDArray[np.int64]
    """D: the number of the image that each lies in."""
    scores: NDArray[np.float64]
    hits: NDArray[np.bool_]
    """thresholds x D: whether it finds a box that no better one has found."""
    counted: NDArray[np.bool_]
    """thresholds x D: whether it counts, as right or as wrong. In a difficult region it does not."""
    boxes: NDArray[np.int64]
    """Number of boxes to be found in each image, difficult ones not counted."""

    @cached_property
    def places(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """For each threshold: places of the hits, places of what does not count, and how many of these each hit has
        before it.
        """
        found = []
        for hits, counted in zip(self.hits, self.counted, strict=True):
            hit, uncounted = np.flatnonzero(hits), np.flatnonzero(~counted)
            found.append((hit, uncounted, np.searchsorted(uncounted, hit)))
        return found


# --- What was found ---


def rank_detections(truths: Sequence[Boxes], found: Sequence[Detections], labels: Sequence[int]) -> list[Ranking]:
    """Match detections with true boxes, by pycocotools.

    `truths` and `found` are of the same images, in the same order. Returns one ranking for each of the `labels`, which
    must be in ascending order. Other labels are left out. A difficult box is one of COCO's crowds: any number of
    detections may lie in it, and their overlap is the share of their own area.
    """
    evaluation = _match(build_truth_dataset(truths, labels), build_found_dataset(found, labels))

    # pycocotools lists its results class by class, in each all images; None where there is nothing in an image.
    rankings = []
    for number in range(len(labels)):
        results = evaluation.evalImgs[number * len(truths) : (number + 1) * len(truths)]
        rankings.append(_rank_class(results))
    return rankings


def build_truth_dataset(
    truths: Sequence[Boxes], labels: Sequence[int], image_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """Build COCO's dataset of true boxes.

    `image_ids` are those of the images; None: their numbers.
    """
    annotations: list[dict[str, Any]] = []
    for image_id, boxes in zip(image_ids or range(len(truths)), truths, strict=True):
        for corners, label, difficult in zip(boxes.corners, boxes.labels, boxes.difficult, strict=True):
            if label in labels:
                entry = _build_annotation(image_id, int(label), corners)
                annotations.append(entry | {"id": len(annotations) + 1, "iscrowd": int(difficult)})
    return {
        "images": [{"id": image_id} for image_id in image_ids or range(len(truths))],
        "annotations": annotations,
        "categories": [{"id": label} for label in labels],
    }


def build_found_dataset(
    found: Sequence[Detections], labels: Sequence[int], image_ids: Sequence[int] | None = None
) -> dict[str, Any]:
    """Build COCO's dataset of detections; arguments as of `build_truth_dataset`."""
    annotations: list[dict[str, Any]] = []
    for image_id, boxes in zip(image_ids or range(len(found)), found, strict=True):
        for corners, label, score in zip(boxes.corners, boxes.labels, boxes.scores, strict=True):
            if label in labels:
                entry = _build_annotation(image_id, int(label), corners)
                annotations.append(entry | {"id": len(annotations) + 1, "iscrowd": 0, "score": float(score)})
    return {"annotations": annotations}


def _build_annotation(image_id: int, label: int, corners: NDArray[np.float64]) -> dict[str, Any]:
    """Build what COCO's boxes have in common; a box is left, top, width, height."""
    left, top, right, bottom = map(float, corners)
    width, height = right - left, bottom - top
    return {"image_id": image_id, "category_id": label, "bbox": [left, top, width, height], "area": width * height}


def _match(truth: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    """Run pycocotools over two datasets; returns its evaluation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # pycocotools prints what it does.
    with contextlib.redirect_stdout(io.StringIO()):
        indexed = []
        for dataset in (truth, found):
            coco = COCO()
            coco.dataset = dataset
            coco.createIndex()
            indexed.append(coco)
        evaluation = COCOeval(*indexed, iouType="bbox")
        evaluation.params.iouThrs = IOU_THRESHOLDS
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.params.areaRng = [AREA_RANGE_PX]
        evaluation.evaluate()
    return evaluation


def _rank_class(results: Sequence[Mapping[str, Any] | None]) -> Ranking:
    """Rank the detections of one class in all images.

    `results` are pycocotools' for each image. Equal scores stay in the order of the images.
    """
    none = np.zeros((len(IOU_THRESHOLDS), 0), bool)
    images, scores, hits, counted = [], [np.zeros(0)], [none], [none]
    boxes = np.zeros(len(results), np.int64)
    for image, result in enumerate(results):
        if result is None:
            continue
        ignored = np.asarray(result["dtIgnore"], bool)
        images += [image] * len(result["dtScores"])
        scores.append(np.array(result["dtScores"], float))
        hits.append((np.asarray(result["dtMatches"]) > 0) & ~ignored)
        counted.append(~ignored)
        boxes[image] = np.count_nonzero(np.asarray(result["gtIgnore"]) == 0)

    all_scores = np.concatenate(scores)
    order = np.argsort(-all_scores, kind="stable")
    return Ranking(
        images=np.array(images, np.int64)[order],
        scores=all_scores[order],
        hits=np.concatenate(hits, axis=1)[:, order],
        counted=np.concatenate(counted, axis=1)[:, order],
        boxes=boxes,
    )


def merge_rankings(first: Ranking, second: Ranking) -> Ranking:
    """Merge two rankings of one class.

    The images of the second get the numbers after those of the first.
    """
    scores = np.concatenate([first.scores, second.scores])
    order = np.argsort(-scores, kind="stable")
    return Ranking(
        images=np.concatenate([first.images, second.images + len(first.boxes)])[order],
        scores=scores[order],
        hits=np.concatenate([first.hits, second.hits], axis=1)[:, order],
        counted=np.concatenate([first.counted, second.counted], axis=1)[:, order],
        boxes=np.concatenate([first.boxes, second.boxes]),
    )


# --- Precision ---


def compute_average_precision(ranking: Ranking, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the average precision at each threshold of overlap.

    `times` says for each image how often it was drawn; ones: every image once. The values are those of pycocotools on
    a list of these images; NaN where no image has a box. Equal scores in one image may differ by a rounding.
    """
    values = np.full(len(IOU_THRESHOLDS), np.nan)
    num_boxes = times @ ranking.boxes
    if num_boxes == 0:
        return values

    drawn = times[ranking.images]
    num_drawn = np.cumsum(drawn)
    for number, (hits, uncounted, num_before) in enumerate(ranking.places):
        if not len(hits):
            values[number] = 0.0
            continue

        # Recall grows at hits alone, and precision is highest there: no other place of the ranking is needed. What was
        # tried up to a hit is all that was drawn, without what does not count.
        right = np.cumsum(drawn[hits])
        tried = num_drawn[hits]
        if len(uncounted):
            tried = tried - np.append(0.0, np.cumsum(drawn[uncounted]))[num_before]
        precision = right / (tried + np.spacing(1))

        # Precision at a recall is the best that this or a higher recall has; beyond the last hit it is 0.
        best = np.zeros(len(hits) + 1)
        best[:-1] = np.maximum.accumulate(precision[::-1])[::-1]
        values[number] = best[np.searchsorted(right / num_boxes, RECALLS, side="left")].mean()
    return values


def compute_table(rankings: Sequence[Ranking], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute AP at an overlap of 0.5, and the mean of AP over all thresholds.

    Returns (1 + classes) x 2: the mean over the classes, then each class. A class without boxes is NaN, and is left out
    of the mean. `times` is as of `compute_average_precision`.
    """
    table = np.full((1 + len(rankings), 2), np.nan)
    for row, ranking in enumerate(rankings, 1):
        values = compute_average_precision(ranking, times)
        table[row] = values[0], values.mean()

    known = ~np.isnan(table[1:, 0])
    if known.any():
        table[0] = table[1:][known].mean(axis=0)
    return table
