"""The results of an evaluation as people and programs read them: cells of a table, CSV and Parquet."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from corun_ray.core.metrics.catalog import list_metrics
from corun_ray.service.report.statistics import Comparison, Interval, compare, describe_gap, estimate_interval

MAX_NAMED_LEFT_OUT = 5

Intervals = Mapping[str, Mapping[str, Interval]]
"""Model → metric → mean and interval."""
Comparisons = Mapping[str, Mapping[str, Comparison]]
"""Model → metric → comparison with the reference."""


@dataclass(frozen=True)
class Measurements:
    """Every metric of every image under every model."""

    images: list[str]
    models: list[str]
    metrics: list[str]
    values: NDArray[np.float64]
    """Images x models x metrics; NaN where a metric has no value for an image."""

    def select(self, model: str, metric: str) -> NDArray[np.float64]:
        """Return one model's values of one metric, one for each image."""
        return self.values[:, self.models.index(model), self.metrics.index(metric)]

    def find_common(self, metric: str) -> NDArray[np.bool_]:
        """Find the images that have a finite value of a metric under every model: `images`, bool.

        Means and comparisons are over these, so that all models are rated by the same images.
        """
        is_finite = np.isfinite(self.values[:, :, self.metrics.index(metric)])
        return np.asarray(is_finite.all(axis=1))

    def describe_images(self) -> str:
        """Describe how many images the means are over: `8 images (psnr 6)`."""
        fewer = []
        for metric in self.metrics:
            count = int(self.find_common(metric).sum())
            if count < len(self.images):
                fewer.append(f"{metric} {count}")
        text = f"{len(self.images)} images"
        return f"{text} ({', '.join(fewer)})" if fewer else text

    def describe_left_out(self) -> list[str]:
        """Describe for each metric the images that its means and comparisons leave out, one metric a line."""
        lines = []
        for metric in self.metrics:
            left_out = np.flatnonzero(~self.find_common(metric))
            if not len(left_out):
                continue

            # Name the first images, each with the models that have no finite value.
            named = [self._describe_gaps(image, metric) for image in left_out[:MAX_NAMED_LEFT_OUT]]
            more = len(left_out) - len(named)
            if more:
                named.append(f"{more} more")
            counts = f"{len(left_out)} of {len(self.images)} images left out of every mean"
            lines.append(f"{metric}: {counts}: {', '.join(named)}")
        return lines

    def _describe_gaps(self, image: int, metric: str) -> str:
        """Describe an image without a finite value under some models: `a.png (hazy: infinite, other: no value)`."""
        gaps = []
        for model, value in zip(self.models, self.values[image, :, self.metrics.index(metric)], strict=True):
            if not np.isfinite(value):
                gaps.append(f"{model}: {describe_gap(value)}")
        return f"{self.images[image]} ({', '.join(gaps)})"

    def estimate_intervals(self) -> dict[str, dict[str, Interval]]:
        """Return mean and interval of every model and metric, over the images that all models have in common."""
        intervals: dict[str, dict[str, Interval]] = {}
        for model in self.models:
            intervals[model] = {}
            for metric in self.metrics:
                values = self.select(model, metric)[self.find_common(metric)]
                intervals[model][metric] = estimate_interval(values)
        return intervals

    def compare_with(self, reference: str) -> dict[str, dict[str, Comparison]]:
        """Compare every model with the model or baseline `reference`, over the images of `find_common`."""
        comparisons: dict[str, dict[str, Comparison]] = {}
        for model in self.models:
            if model == reference:
                continue
            comparisons[model] = {}
            for metric in self.metrics:
                lower_better = list_metrics()[metric].lower_better
                common = self.find_common(metric)
                values, reference_values = self.select(model, metric), self.select(reference, metric)
                comparisons[model][metric] = compare(values[common], reference_values[common], lower_better)
        return comparisons

    def to_table(self) -> pa.Table:
        """Return one row for each image and model.

        The columns are `image`, `model`, then each metric, null where the metric has no value.
        """
        # Every image is repeated for each model, in the order of the values.
        images, models = np.array(self.images, dtype=object), np.array(self.models, dtype=object)
        columns = {
            "image": pa.array(images.repeat(len(models))),
            "model": pa.array(np.tile(models, len(images))),
        }
        for number, metric in enumerate(self.metrics):
            # from_pandas turns NaN into null.
            columns[metric] = pa.array(self.values[:, :, number].ravel(), from_pandas=True)
        return pa.table(columns)


# --- Cells for people ---


def format_intervals(intervals: Intervals) -> list[list[str]]:
    """Return a heading, then each model's means.

    An arrow in the heading points to where a metric is better.
    """
    # The first column names the models.
    heading = [""]
    for metric in next(iter(intervals.values())):
        arrow = "↓" if list_metrics()[metric].lower_better else "↑"
        heading.append(f"{metric} {arrow}")

    rows = [heading]
    for model, row in intervals.items():
        rows.append([model, *map(format_interval, row.values())])
    return rows


def format_comparisons(comparisons: Comparisons) -> list[list[str]]:
    """Return a row for each model and metric.

    The cells are model, metric, mean difference with its interval, number of better images, p-value and verdict.
    """
    rows = []
    for model, row in comparisons.items():
        for metric, comparison in row.items():
            difference = format_interval(comparison.difference, signed=True)
            better = f"better on {comparison.better} of {comparison.difference.count}"
            rows.append([model, metric, difference, better, f"p {comparison.p_value:.4f}", comparison.verdict])
    return rows


def format_interval(interval: Interval, signed: bool = False) -> str:
    """Return `MEAN [LOW, HIGH]`.

    Without an interval, return the mean alone; without images, `-`.
    """
    if not interval.count:
        return "-"

    # A difference shows its sign even where it is positive.
    sign = "+" if signed else ""
    mean = f"{interval.mean:{sign}.3f}"
    if np.isnan(interval.low):
        return mean
    return f"{mean} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


# --- Tables for programs ---


def build_interval_table(intervals: Intervals) -> pa.Table:
    """Return a table of `model`, `metric`, `mean`, `low`, `high`, `images`."""
    # One row for each model and metric.
    rows = []
    for model, row in intervals.items():
        for metric, interval in row.items():
            rows.append(
                {
                    "model": model,
                    "metric": metric,
                    "mean": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "images": interval.count,
                }
            )
    return pa.Table.from_pylist(rows)


def build_comparison_table(comparisons: Comparisons, reference: str) -> pa.Table:
    """Return a row for each model and metric.

    The columns are `model`, `against`, `metric`, `difference`, `low`, `high`, `images`, `better`, `p_value`, `verdict`.
    """
    rows = []
    for model, row in comparisons.items():
        for metric, comparison in row.items():
            rows.append(
                {
                    "model": model,
                    "against": reference,
                    "metric": metric,
                    "difference": comparison.difference.mean,
                    "low": comparison.difference.low,
                    "high": comparison.difference.high,
                    "images": comparison.difference.count,
                    "better": comparison.better,
                    "p_value": comparison.p_value,
                    "verdict": comparison.verdict,
                }
            )
    return pa.Table.from_pylist(rows)


def encode_csv(table: pa.Table) -> bytes:
    """Return the table as CSV with column names."""
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer, pyarrow.csv.WriteOptions(quoting_style="needed"))
    return buffer.getvalue()


def encode_parquet(table: pa.Table) -> bytes:
    """Return the table as a Parquet file."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()
