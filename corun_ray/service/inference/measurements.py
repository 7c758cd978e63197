"""What an evaluation came to, as people and programs read it: tables of lines, CSV and Parquet."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from corun_ray.core.metrics.catalog import list_metrics
from corun_ray.service.report.statistics import Comparison, Interval, compare, estimate_interval


@dataclass(frozen=True)
class Measurements:
    """Every metric of every image under every model."""

    images: list[str]
    models: list[str]
    metrics: list[str]
    values: NDArray[np.float64]
    """Images x models x metrics; NaN where a metric has no value for an image."""

    def of(self, model: str, metric: str) -> NDArray[np.float64]:
        """One model's values of one metric, an image each."""
        return self.values[:, self.models.index(model), self.metrics.index(metric)]

    def intervals(self) -> dict[str, dict[str, Interval]]:
        """Model → metric → mean and interval."""
        return {
            model: {metric: estimate_interval(self.of(model, metric)) for metric in self.metrics}
            for model in self.models
        }

    def comparisons(self, reference: str) -> dict[str, dict[str, Comparison]]:
        """Model → metric → how it compares with the model or baseline `reference`."""
        return {
            model: {
                metric: compare(self.of(model, metric), self.of(reference, metric), list_metrics()[metric].lower_better)
                for metric in self.metrics
            }
            for model in self.models
            if model != reference
        }

    def table(self) -> pa.Table:
        """One row an image and model: `image`, `model`, then a column a metric, null where it has no value."""
        images, models = np.array(self.images, dtype=object), np.array(self.models, dtype=object)
        columns = {"image": pa.array(images.repeat(len(models))), "model": pa.array(np.tile(models, len(images)))}
        for number, metric in enumerate(self.metrics):
            columns[metric] = pa.array(self.values[:, :, number].ravel(), from_pandas=True)
        return pa.table(columns)


def summary_cells(intervals: dict[str, dict[str, Interval]]) -> list[list[str]]:
    """A heading, then a row a model: means with their intervals, an arrow to where a metric is better."""
    metrics = list(next(iter(intervals.values())))
    heads = [f"{metric} {'↓' if list_metrics()[metric].lower_better else '↑'}" for metric in metrics]
    return [["", *heads], *([model, *map(_cell, row.values())] for model, row in intervals.items())]


def comparison_cells(comparisons: dict[str, dict[str, Comparison]]) -> list[list[str]]:
    """A row a model and metric: the mean difference with its interval, how many images are better, the verdict."""
    return [
        [
            model,
            metric,
            _cell(found.difference, signed=True),
            f"better on {found.better} of {found.difference.count}",
            f"p {found.p_value:.4f}",
            found.verdict,
        ]
        for model, row in comparisons.items()
        for metric, found in row.items()
    ]


def summary_table(intervals: dict[str, dict[str, Interval]]) -> pa.Table:
    """`model`, `metric`, `mean`, `low`, `high`, `images`."""
    rows = [
        {"model": model, "metric": metric, "mean": i.mean, "low": i.low, "high": i.high, "images": i.count}
        for model, row in intervals.items()
        for metric, i in row.items()
    ]
    return pa.Table.from_pylist(rows)


def comparison_table(comparisons: dict[str, dict[str, Comparison]], reference: str) -> pa.Table:
    """`model`, `against`, `metric`, `difference`, `low`, `high`, `images`, `better`, `p_value`, `verdict`."""
    rows = [
        {
            "model": model,
            "against": reference,
            "metric": metric,
            "difference": c.difference.mean,
            "low": c.difference.low,
            "high": c.difference.high,
            "images": c.difference.count,
            "better": c.better,
            "p_value": c.p_value,
            "verdict": c.verdict,
        }
        for model, row in comparisons.items()
        for metric, c in row.items()
    ]
    return pa.Table.from_pylist(rows)


def as_csv(table: pa.Table) -> bytes:
    """The table with a line of names."""
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer, pyarrow.csv.WriteOptions(quoting_style="needed"))
    return buffer.getvalue()


def as_parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under each other, columns two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(interval: Interval, signed: bool = False) -> str:
    if not interval.count:
        return "-"
    sign = "+" if signed else ""
    text = f"{interval.mean:{sign}.3f}"
    return text if np.isnan(interval.low) else f"{text} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
