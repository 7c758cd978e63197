"""Detection on restored images: whether a detector finds more boxes in the pictures of one model than in another's."""

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from corun_ray.config.tasks import EvaluateSection
from corun_ray.core.data.images import decode_image, encode_png
from corun_ray.core.inference.pictures import DrawnBox, PictureRow, draw_boxes, draw_grid
from corun_ray.core.metrics.detection import (
    Boxes,
    Detections,
    Ranking,
    build_found_dataset,
    build_truth_dataset,
    compute_table,
    merge_rankings,
    rank_detections,
)
from corun_ray.core.metrics.detector import get_detector_file, list_detector_classes, load_detector
from corun_ray.service.data.annotations import AnnotationError, Truth, read_truth
from corun_ray.service.inference.measurements import encode_csv, format_interval
from corun_ray.service.report.page import Listing, PageSection, PictureItem, Table
from corun_ray.service.report.statistics import CONFIDENCE, Interval
from corun_ray.service.telemetry.tables import format_table
from corun_ray.service.weights.needed import open_weights

DRAWS = 500
"""Draws of the bootstrap, and of the test: precision over all images is computed anew for each."""
SHEET_CELL_PX = 400
SHOWN_SCORE = 0.3
"""Score from which on a detection is drawn."""
MAX_SHOWN = 20
"""Detections drawn in one picture."""
TABLE_FILE = "detection.csv"
COMPARISON_FILE = "detection_comparison.csv"
SHEET_FILE = "detection.png"
BOXES_FILE = "detections/boxes.json"


# --- Before Ray starts ---


def plan_detection(section: EvaluateSection, images: Sequence[str]) -> Truth | None:
    """Read the true boxes and try the detector's file; None for a job without a detector.

    Raises `StorageError`, `AnnotationError` and `WeightsError`.
    """
    if section.detector is None:
        return None

    truth = read_truth(section, images, list_detector_classes(section.detector, section.detector_classes))
    PictureDetector(section, truth.classes, "cpu")
    return truth


# --- In an actor ---


class PictureDetector:
    """Looks for boxes of some classes in the pictures of all models."""

    def __init__(self, section: EvaluateSection, classes: Mapping[str, int], device: torch.device | str) -> None:
        """Load the detector of the section; raises `WeightsError`."""
        assert section.detector is not None
        file = section.detector_file or get_detector_file(section.detector)
        self.labels = sorted(classes.values())
        self.detect = load_detector(
            section.detector, file, section.detector_classes, open_weights(section.weights), device
        )

    def __call__(self, pictures: Mapping[str, Tensor]) -> str:
        """Return what is found in the pictures of one image.

        Pictures are 1 3 H W in [0, 1], by model. The text is for `read_findings`.
        """
        found = {}
        for name, picture in pictures.items():
            detections = self.detect(picture)
            wanted = np.isin(detections.labels, self.labels)
            found[name] = {
                "corners": detections.corners[wanted].tolist(),
                "labels": detections.labels[wanted].tolist(),
                "scores": detections.scores[wanted].tolist(),
            }
        height, width = next(iter(pictures.values())).shape[-2:]
        return json.dumps({"size_px": [width, height], "found": found})


def read_findings(text: str) -> tuple[tuple[int, int], dict[str, Detections]]:
    """Read a text of `PictureDetector`.

    Returns width and height of the pictures, and what was found in that of each model.
    """
    content = json.loads(text)
    found = {}
    for name, columns in content["found"].items():
        found[name] = Detections(
            corners=np.array(columns["corners"], float).reshape(-1, 4),
            labels=np.array(columns["labels"], np.int64),
            scores=np.array(columns["scores"], float),
        )
    width, height = content["size_px"]
    return (width, height), found


# --- All images, in the driver ---


@dataclass(frozen=True)
class Difference:
    """Average precision of one model minus that of the reference."""

    interval: Interval
    p_value: float
    """Chance of a difference as large if the pictures of the two were swapped, image by image, by coin flips."""
    verdict: str
    """Of the model: `better`, `worse` or `no difference shown`."""


@dataclass(frozen=True)
class DetectionResult:
    """What a detector found in the pictures of every model, and figures of it."""

    section: EvaluateSection
    truth: Truth
    images: list[str]
    found: dict[str, list[Detections]]
    """Model → detections in each of the images."""
    skipped: dict[str, str]
    """URI → reason, of images that do not fit their annotation."""
    contact_sheet: bytes
    """PNG of some images with the boxes drawn."""

    @property
    def figures(self) -> list[str]:
        """Names of the figures: `map50`, `map`, and for each class `ap50/CLASS` and `ap/CLASS`."""
        names = ["map50", "map"]
        for label in self.truth.classes:
            names += [f"ap50/{label}", f"ap/{label}"]
        return names

    @property
    def boxes(self) -> list[Boxes]:
        """The true boxes of each of the images."""
        return [self.truth.boxes[image] for image in self.images]

    @cached_property
    def rankings(self) -> dict[str, list[Ranking]]:
        """Model → ranking of the detections of each class."""
        labels = list(self.truth.classes.values())
        return {model: rank_detections(self.boxes, found, labels) for model, found in self.found.items()}

    @cached_property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """Model → its figures over all images; NaN for a class without boxes."""
        once = np.ones(len(self.images))
        return {model: compute_table(ranking, once).ravel() for model, ranking in self.rankings.items()}

    @cached_property
    def draws(self) -> dict[str, NDArray[np.float64]]:
        """Model → draws x figures, over images drawn with replacement; the draws are the same for all models."""
        # A fixed seed: the same detections always have the same intervals.
        generator = np.random.default_rng(0)
        num_images = len(self.images)
        rows: dict[str, list[NDArray[np.float64]]] = {model: [] for model in self.found}
        for _ in range(DRAWS):
            times = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images).astype(float)
            for model, ranking in self.rankings.items():
                rows[model].append(compute_table(ranking, times).ravel())
        return {model: np.stack(tables) for model, tables in rows.items()}

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """Model → figure → value and bootstrap interval."""
        found = {}
        for model, values in self.values.items():
            found[model] = self._estimate_intervals(values, self.draws[model])
        return found

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """Model → figure → difference from the reference; empty without a reference."""
        reference = self.section.reference
        if reference is None:
            return {}

        found = {}
        for model, values in self.values.items():
            if model == reference:
                continue
            observed = values - self.values[reference]
            intervals = self._estimate_intervals(observed, self.draws[model] - self.draws[reference])
            chances = self._test_by_swaps(model, reference, observed)
            found[model] = {
                name: Difference(interval, chances[name], _judge(interval.mean, chances[name]))
                for name, interval in intervals.items()
            }
        return found

    def _estimate_intervals(self, values: NDArray[np.float64], draws: NDArray[np.float64]) -> dict[str, Interval]:
        """Return each figure with the percentiles of its draws; a single image has no interval."""
        tail = 100 * (1 - CONFIDENCE) / 2
        found = {}
        for number, name in enumerate(self.figures):
            # A draw may have no box of a class.
            drawn = draws[:, number]
            drawn = drawn[~np.isnan(drawn)]
            low, high = np.nan, np.nan
            if len(self.images) > 1 and len(drawn):
                low, high = np.percentile(drawn, [tail, 100 - tail])
            count = 0 if np.isnan(values[number]) else len(self.images)
            found[name] = Interval(float(values[number]), float(low), float(high), count)
        return found

    def _test_by_swaps(self, model: str, reference: str, observed: NDArray[np.float64]) -> dict[str, float]:
        """Test whether two models differ, figure by figure.

        Precision is no mean over images, so signs cannot be flipped. In place of that, a coin decides for each image
        whose detections are whose. Two-sided; returns p-values.
        """
        pairs = zip(self.rankings[model], self.rankings[reference], strict=True)
        merged = [merge_rankings(first, second) for first, second in pairs]
        generator = np.random.default_rng(0)

        # The observed assignment counts as one of the draws, so that no chance is 0.
        as_large = np.ones(len(observed))
        for _ in range(DRAWS):
            kept = generator.integers(2, size=len(self.images)).astype(float)
            first = compute_table(merged, np.concatenate([kept, 1 - kept])).ravel()
            second = compute_table(merged, np.concatenate([1 - kept, kept])).ravel()
            as_large += np.abs(first - second) >= np.abs(observed) - 1e-12
        return dict(zip(self.figures, (as_large / (DRAWS + 1)).tolist(), strict=True))

    # --- What is shown and stored ---

    @property
    def note(self) -> str:
        """The line above the table."""
        return (
            f"boxes found by {self.section.detector} in {len(self.images)} images: COCO's average precision at an "
            f"overlap of 0.5 (map50) and over 0.5 to 0.95 (map), with 95 % bootstrap intervals; then ap50 by class"
        )

    @property
    def differences_note(self) -> str:
        """The line above the differences."""
        return f"difference from {self.section.reference} (p: the two swapped image by image)"

    def format_values(self) -> list[list[str]]:
        """Return a heading, then the figures of each model."""
        rows = [["", "map50 ↑", "map ↑", *self.truth.classes]]
        for model, row in self.intervals.items():
            cells = [model, format_interval(row["map50"]), format_interval(row["map"])]
            for label in self.truth.classes:
                value = row[f"ap50/{label}"].mean
                cells.append("-" if np.isnan(value) else f"{value:.3f}")
            rows.append(cells)
        return rows

    def format_differences(self) -> list[list[str]]:
        """Return a row for each model and mean: difference with interval, p-value and verdict."""
        rows = []
        for model, row in self.differences.items():
            for name in ("map50", "map"):
                one = row[name]
                difference = format_interval(one.interval, signed=True)
                rows.append([model, name, difference, f"p {one.p_value:.4f}", one.verdict])
        return rows

    def to_lines(self) -> list[str]:
        """Return the lines to show on the console."""
        lines = ["", self.note, *format_table(self.format_values()).splitlines()]
        if self.differences:
            lines += ["", self.differences_note, *format_table(self.format_differences()).splitlines()]
        return lines + self.list_missing()

    def list_missing(self) -> list[str]:
        """Return a line for each image left out, and one for annotations without an image."""
        lines = [f"no detection: {uri}: {reason}" for uri, reason in self.skipped.items()]
        if self.truth.unused:
            lines.append(f"{len(self.truth.unused)} annotations match no image ({self.truth.unused[0]}, ...)")
        return lines

    def to_metrics(self) -> dict[str, float]:
        """Return the figures for MLflow: `MODEL/map50` and so on."""
        metrics = {}
        for model, values in self.values.items():
            for name, value in zip(self.figures, values, strict=True):
                if not np.isnan(value):
                    metrics[f"{model}/{name}"] = float(value)
        return metrics

    def to_sections(self) -> list[PageSection]:
        """Return the sections of the report's page; those without items are for the page to omit."""
        values = self.format_values()
        items: list[Table | PictureItem | Listing] = [Table(values[0], values[1:])]
        items.append(PictureItem([(f"green: true boxes; score {SHOWN_SCORE} and more", self.contact_sheet)], True))
        if self.list_missing():
            items.append(Listing("\n".join(self.list_missing())))

        rows = self.format_differences()
        differences = [Table([""] * len(rows[0]), rows)] if rows else []
        return [
            PageSection("Detection", self.note, items),
            PageSection("Differences of detection", self.differences_note, differences),
        ]

    def to_files(self) -> dict[str, bytes]:
        """Return the files of the run by name: tables, the sheet, and boxes in COCO's formats."""
        files = {
            TABLE_FILE: encode_csv(self._build_table()),
            SHEET_FILE: self.contact_sheet,
            BOXES_FILE: _encode_json(self._build_truth_file()),
        }
        if self.differences:
            files[COMPARISON_FILE] = encode_csv(self._build_comparison_table())

        # COCO's format of results: a list of boxes.
        for model, found in self.found.items():
            dataset = build_found_dataset(found, list(self.truth.classes.values()), self._image_ids)
            results = [
                {key: entry[key] for key in ("image_id", "category_id", "bbox", "score")}
                for entry in dataset["annotations"]
            ]
            files[f"detections/{model}.json"] = _encode_json(results)
        return files

    @property
    def _image_ids(self) -> list[int]:
        """COCO's numbers of the images."""
        return [self.truth.image_ids[image] for image in self.images]

    def _build_truth_file(self) -> dict[str, Any]:
        """Build COCO's annotations of the images that were measured."""
        dataset = build_truth_dataset(self.boxes, list(self.truth.classes.values()), self._image_ids)
        images = zip(self._image_ids, self.images, strict=True)
        dataset["images"] = [{"id": number, "file_name": image} for number, image in images]
        dataset["categories"] = [{"id": number, "name": label} for label, number in self.truth.classes.items()]
        return dataset

    def _build_table(self) -> pa.Table:
        """Return `model`, `class`, `figure`, `value`, `low`, `high`, `images`, `boxes`; the class of means is `all`."""
        counts = {"all": 0}
        for label, number in self.truth.classes.items():
            counts[label] = sum(int(((one.labels == number) & ~one.difficult).sum()) for one in self.boxes)
            counts["all"] += counts[label]

        rows = []
        for model, row in self.intervals.items():
            for name, interval in row.items():
                figure, label = _split_figure(name)
                rows.append(
                    {
                        "model": model,
                        "class": label,
                        "figure": figure,
                        "value": interval.mean,
                        "low": interval.low,
                        "high": interval.high,
                        "images": interval.count,
                        "boxes": counts[label],
                    }
                )
        return pa.Table.from_pylist(rows)

    def _build_comparison_table(self) -> pa.Table:
        """Return a row for each model and figure, as `build_comparison_table` does for metrics."""
        rows = []
        for model, row in self.differences.items():
            for name, one in row.items():
                figure, label = _split_figure(name)
                rows.append(
                    {
                        "model": model,
                        "against": self.section.reference,
                        "class": label,
                        "figure": figure,
                        "difference": one.interval.mean,
                        "low": one.interval.low,
                        "high": one.interval.high,
                        "images": one.interval.count,
                        "p_value": one.p_value,
                        "verdict": one.verdict,
                    }
                )
        return pa.Table.from_pylist(rows)


def assess_detections(
    section: EvaluateSection, truth: Truth, findings: Mapping[str, str], strips: Mapping[str, bytes]
) -> DetectionResult:
    """Gather what the detector found.

    `findings` are texts of `PictureDetector` by image. `strips` are the pictures of some images, side by side in the
    order of the section's names, as PNG.

    Raises `AnnotationError` where no image has the size that its annotation says.
    """
    images: list[str] = []
    found: dict[str, list[Detections]] = {name: [] for name in section.names}
    skipped: dict[str, str] = {}
    for image, text in sorted(findings.items()):
        size_px, by_model = read_findings(text)
        reason = _find_misfit(truth, image, size_px)
        if reason:
            skipped[posixpath.join(section.hazy, image)] = reason
            continue
        images.append(image)
        for name in section.names:
            found[name].append(by_model[name])

    if not findings:
        raise AnnotationError("evaluate.models: no image has a picture of every model, to detect objects in")
    if not images:
        first = next(iter(skipped.items()))
        raise AnnotationError(f"evaluate.boxes: none of {len(skipped)} images fits its annotation ({': '.join(first)})")
    sheet = _draw_sheet(truth, images, found, strips)
    return DetectionResult(section, truth, images, found, skipped, sheet)


def _find_misfit(truth: Truth, image: str, size_px: tuple[int, int]) -> str:
    """Return why an annotation is not that of a picture of this size; empty where it may be."""
    marked = truth.sizes_px[image]
    shown = f"{size_px[0]} x {size_px[1]} px"
    if marked is not None and marked != size_px:
        return f"its annotation is for {marked[0]} x {marked[1]} px, but it has {shown}"
    corners = truth.boxes[image].corners
    if len(corners) and (corners[:, 2].max() > size_px[0] + 1 or corners[:, 3].max() > size_px[1] + 1):
        return f"a box of its annotation is not within its {shown}"
    return ""


def _draw_sheet(
    truth: Truth, images: Sequence[str], found: Mapping[str, Sequence[Detections]], strips: Mapping[str, bytes]
) -> bytes:
    """Draw the pictures of some images with true and found boxes; returns a PNG."""
    names = {number: label for label, number in truth.classes.items()}
    rows = []
    for number, image in enumerate(images):
        if image not in strips:
            continue
        boxes = truth.boxes[image]
        true_boxes = [
            DrawnBox(tuple(corners), names.get(int(label), ""), is_true=True)
            for corners, label in zip(boxes.corners, boxes.labels, strict=True)
        ]
        row: PictureRow = {}
        for model, picture in zip(found, np.split(decode_image(strips[image]), len(found), axis=1), strict=True):
            detected = _choose_shown(found[model][number], names)
            row[model] = draw_boxes(picture, [*true_boxes, *detected], SHEET_CELL_PX)
        rows.append(row)

    # Every shown image may have been left out.
    return encode_png(draw_grid(rows or [dict.fromkeys(found)], cell_px=SHEET_CELL_PX))


def _choose_shown(found: Detections, names: Mapping[int, str]) -> list[DrawnBox]:
    """Return the detections to draw, best score last, so that it is on top."""
    best = np.argsort(-found.scores, kind="stable")[:MAX_SHOWN]
    shown = []
    for place in best[::-1]:
        score = found.scores[place]
        if score >= SHOWN_SCORE:
            text = f"{names[int(found.labels[place])]} {score:.2f}"
            shown.append(DrawnBox(tuple(found.corners[place]), text, is_true=False))
    return shown


def _judge(difference: float, p_value: float) -> str:
    """Return the verdict of a test."""
    if np.isnan(difference) or p_value >= 1 - CONFIDENCE:
        return "no difference shown"
    return "better" if difference > 0 else "worse"


def _split_figure(name: str) -> tuple[str, str]:
    """Split `ap50/car` into figure and class; the class of `map50` and `map` is `all`."""
    figure, _, label = name.partition("/")
    return figure.removeprefix("m"), label or "all"


def _encode_json(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"
