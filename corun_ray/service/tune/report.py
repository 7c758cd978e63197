"""The results of a search: its trials ranked, as a table, a CSV, a plot of metric and cost, and a page."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ray.tune import Result
from torch.utils.flop_counter import FlopCounterMode

from corun_ray.config.jobs import TuneJob
from corun_ray.config.loading import dump_job
from corun_ray.config.trials import build_trial_job
from corun_ray.core.networks.build import build_network
from corun_ray.service.errors import JobFailed, find_root_cause
from corun_ray.service.models.sources import get_network_spec
from corun_ray.service.report.page import Listing, PageSection, PictureItem, Table, render
from corun_ray.service.telemetry.tables import format_table

RATE_METRIC = "rate/steps_per_s"
VALIDATION_PREFIX = "val/"
PLOT_SIZE_INCHES = (11, 4.5)
PLOT_DPI = 110
BEST_MARKER_SIZE = 160


@dataclass(frozen=True)
class TrialResult:
    """One trial after the end of the search."""

    name: str
    values: Mapping[str, Any]
    """The values that the search chose, by key of the job file."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    model: str | None = None
    """None: the trial failed, or was stopped because it fell behind."""
    error: str | None = None

    @classmethod
    def from_ray(cls, result: Result) -> "TrialResult":
        """Convert a result of Ray Tune."""
        last = result.metrics or {}

        # Our metrics have a slash in their names; Tune's own do not, except for the searched keys.
        metrics = {}
        for name, value in last.items():
            if "/" in name and not name.startswith("config/") and isinstance(value, int | float):
                metrics[name] = float(value)

        return cls(
            name=result.path.rstrip("/").rpartition("/")[2],
            values=dict(result.config or {}),
            metrics=metrics,
            step=last.get("step", 0),
            model=last.get("model"),
            error=None if result.error is None else _extract_reason(str(result.error)),
        )

    @property
    def validation(self) -> dict[str, float]:
        """The metrics of the last validation."""
        found = {}
        for name, value in self.metrics.items():
            if name.startswith(VALIDATION_PREFIX):
                found[name] = value
        return found


def _extract_reason(traceback: str) -> str:
    """Return the reason of a trial's failure.

    A `JobFailed` has several lines that are all needed; of another error, the root cause is enough.
    """
    _, marker, message = traceback.rpartition(f"{JobFailed.__name__}: ")
    return message.strip() if marker else find_root_cause(traceback)


@dataclass(frozen=True)
class NetworkCost:
    """The cost of a network, which does not depend on its training."""

    parameters: int
    gflops: float
    """One forward pass of one training patch; a multiplication and an addition count as two."""


@dataclass(frozen=True)
class SearchSummary:
    """The results of a search, to be shown and stored."""

    cells: list[list[str]]
    """A heading, then a row for each trial."""
    csv: bytes
    png: bytes

    @property
    def lines(self) -> list[str]:
        """The cells as lines of aligned columns."""
        heading, *rows = self.cells
        return format_table(rows, heading, right=range(len(heading))).splitlines()

    def render_page(self, job: TuneJob, run: str) -> bytes:
        """Render the page about a search.

        `run` is the name of the search's run.
        """
        better = "less" if job.tune.mode == "min" else "more"
        heading, *rows = self.cells
        plot = PictureItem([("", self.png)], is_wide=True)
        sections = [
            PageSection("Trials", "Best first; trials that were stopped come last.", [Table(heading, rows)]),
            PageSection("Plot", "The metric of each trial, and the cost of its network.", [plot]),
            PageSection("Job", "The job file with every default filled in.", [Listing(dump_job(job))]),
        ]
        return render(run, f"{job.tune.num_trials} trials, {better} of {job.tune.metric} is better.", sections)


# --- From trials to a summary ---


def rank_trials(trials: Sequence[TrialResult], metric: str, mode: str) -> list[TrialResult]:
    """Sort the trials, best first.

    `mode` is `min` or `max`. Trials that were stopped come after those that ended, and of both those last whose metric
    is NaN; failed trials are omitted.
    """
    sign = 1 if mode == "min" else -1

    def order(trial: TrialResult) -> tuple[bool, bool, float]:
        value = trial.metrics[metric]
        is_nan = math.isnan(value)
        return trial.model is None, is_nan, 0.0 if is_nan else sign * value

    measured = []
    for trial in trials:
        if trial.error is None and metric in trial.metrics:
            measured.append(trial)
    return sorted(measured, key=order)


def measure_cost(job: TuneJob, trial: TrialResult) -> NetworkCost:
    """Count a trial's parameters and operations on one random patch."""
    own_job = build_trial_job(job, trial.values)
    network = build_network(get_network_spec(own_job)).eval()
    side_px = own_job.data.patch_px
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, side_px, side_px))

    parameters = sum(parameter.numel() for parameter in network.parameters())
    return NetworkCost(parameters, counter.get_total_flops() / 1e9)


def summarise_search(job: TuneJob, trials: Sequence[TrialResult]) -> SearchSummary:
    """Summarise ranked trials, the best first."""
    costs, rows = [], []
    for trial in trials:
        cost = measure_cost(job, trial)
        costs.append(cost)
        rows.append(_make_row(job, trial, cost))

    # A trial may lack a metric of others: the columns are those of all rows, in order of their first appearance.
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))

    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return SearchSummary(_make_cells(rows), text.getvalue().encode(), _plot(job, trials, costs))


def _make_row(job: TuneJob, trial: TrialResult, cost: NetworkCost) -> dict[str, Any]:
    """Return a trial's values, cost, pace and metrics."""
    own_job = build_trial_job(job, trial.values)
    steps_per_s = trial.metrics.get(RATE_METRIC, 0.0)
    images_per_s = steps_per_s * own_job.train.images_per_worker * own_job.cluster.max_workers

    # Searched keys stand without their section, metrics without their prefix.
    row: dict[str, Any] = {}
    for key, value in trial.values.items():
        row[key.rpartition(".")[2]] = value
    row |= {"parameters": cost.parameters, "GFLOPs": round(cost.gflops, 3), "images/s": round(images_per_s, 2)}
    for name, value in trial.validation.items():
        row[name.removeprefix(VALIDATION_PREFIX)] = round(value, 4)
    row |= {"steps": trial.step, "trial": trial.name}
    return row


def _make_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a heading, then the cells of every row.

    The columns are those of the best trial.
    """
    columns = list(rows[0])
    cells = [columns]
    for row in rows:
        cells.append([str(row.get(column, "")) for column in columns])
    return cells


# --- The plot ---


def _plot(job: TuneJob, trials: Sequence[TrialResult], costs: Sequence[NetworkCost]) -> bytes:
    """Plot metric and cost against the first searched key.

    Returns a PNG.
    """
    key, metric = next(iter(job.tune.search)), job.tune.metric
    better = "less" if job.tune.mode == "min" else "more"
    metrics = [trial.metrics[metric] for trial in trials]
    gflops = [cost.gflops for cost in costs]

    # The metric at the left, the cost at the right.
    figure = Figure(figsize=PLOT_SIZE_INCHES, layout="constrained")
    metric_axes, cost_axes = figure.subplots(1, 2)
    _plot_trials(metric_axes, key, trials, metrics, f"{metric} ({better} is better)")
    _plot_trials(cost_axes, key, trials, gflops, "GFLOPs of a patch, forward")

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=PLOT_DPI)
    return file.getvalue()


def _plot_trials(axes: Axes, key: str, trials: Sequence[TrialResult], heights: Sequence[float], label: str) -> None:
    """Plot one height of each trial.

    The first trial is the best.
    """
    positions = [trial.values[key] for trial in trials]

    # Trials that ended and trials that were stopped have different markers.
    for has_ended, marker, name in ((True, "o", "ended"), (False, "x", "stopped early")):
        xs, ys = [], []
        for trial, position, height in zip(trials, positions, heights, strict=True):
            if (trial.model is not None) == has_ended:
                xs.append(position)
                ys.append(height)
        if xs:
            axes.scatter(xs, ys, marker=marker, label=name)
    axes.scatter([positions[0]], [heights[0]], s=BEST_MARKER_SIZE, facecolors="none", edgecolors="C3", label="best")

    # Whole numbers get no ticks between them.
    axes.set(xlabel=key, ylabel=label)
    if all(isinstance(position, int) for position in positions):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, alpha=0.3)
    axes.legend()
