"""What the trials of a search came to: a table, best first, a CSV, and a picture of metric and cost."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.flop_counter import FlopCounterMode

from corun_ray.config.jobs import TuneJob
from corun_ray.config.loading import dump_job
from corun_ray.config.trials import trial_job
from corun_ray.core.networks.build import build_network
from corun_ray.service.errors import JobFailed, find_root_cause
from corun_ray.service.models.sources import get_network_spec
from corun_ray.service.report.page import Listing, PageSection, PictureItem, Table, render

RATE = "rate/steps_per_s"
VALIDATION = "val/"


@dataclass(frozen=True)
class TrialResult:
    """One trial when all have ended."""

    name: str
    values: Mapping[str, Any]
    """What the search gave it, by key."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    model: str | None = None
    """None: it failed, or was stopped because it fell behind."""
    error: str | None = None

    @classmethod
    def of(cls, result: Any) -> "TrialResult":
        """From a result of Ray Tune."""
        last = result.metrics or {}
        numbers = {name: float(value) for name, value in last.items() if "/" in name and isinstance(value, int | float)}
        return cls(
            name=result.path.rstrip("/").rpartition("/")[2],
            values=dict(result.config or {}),
            metrics={name: value for name, value in numbers.items() if not name.startswith("config/")},
            step=last.get("step", 0),
            model=last.get("model"),
            error=None if result.error is None else _reason(str(result.error)),
        )

    @property
    def validation(self) -> dict[str, float]:
        """What it was last measured at."""
        return {name: value for name, value in self.metrics.items() if name.startswith(VALIDATION)}


def _reason(traceback: str) -> str:
    """What a trial died of: a job's own account of its failure has lines, of which none is to be lost."""
    _, told, account = traceback.rpartition(f"{JobFailed.__name__}: ")
    return account.strip() if told else find_root_cause(traceback)


@dataclass(frozen=True)
class NetworkCost:
    """What a network costs, whatever it was trained to."""

    parameters: int
    gflops: float
    """Of one forward pass of one training patch; a multiplication and an addition are two."""


@dataclass(frozen=True)
class SearchSummary:
    """What is shown and kept of a search."""

    cells: list[list[str]]
    """A heading, then a row a trial."""
    csv: bytes
    png: bytes

    @property
    def lines(self) -> list[str]:
        """The cells under each other."""
        widths = [max(map(len, column)) for column in zip(*self.cells, strict=True)]
        return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in self.cells]

    def report(self, job: TuneJob, run: str) -> bytes:
        """The page about the search whose run is called `run`."""
        better = "less" if job.tune.mode == "min" else "more"
        sections = [
            PageSection("Trials", "Best first; those that were stopped last.", [Table(self.cells[0], self.cells[1:])]),
            PageSection(
                "Plot", "What a trial came to, and what its network costs.", [PictureItem([("", self.png)], True)]
            ),
            PageSection("Job", "The job file with every default filled in.", [Listing(dump_job(job))]),
        ]
        return render(run, f"{job.tune.num_trials} trials, {better} of {job.tune.metric} is better.", sections)


def rank_trials(trials: Sequence[TrialResult], metric: str, mode: str) -> list[TrialResult]:
    """Best first; trials that were stopped come after those that ended, failed ones are left out."""
    sign = 1 if mode == "min" else -1
    measured = [trial for trial in trials if trial.error is None and metric in trial.metrics]
    return sorted(measured, key=lambda trial: (trial.model is None, sign * trial.metrics[metric]))


def measure_cost(job: TuneJob, trial: TrialResult) -> NetworkCost:
    """Counted on the network itself, with one patch of noise."""
    own = trial_job(job, trial.values)
    network = build_network(get_network_spec(own)).eval()
    side_px = own.data.patch_px
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, side_px, side_px))
    return NetworkCost(sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 1e9)


def summarise_search(job: TuneJob, trials: Sequence[TrialResult]) -> SearchSummary:
    """Of trials in their order, the best first."""
    costs = [measure_cost(job, trial) for trial in trials]
    rows = [_row(job, trial, cost) for trial, cost in zip(trials, costs, strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return SearchSummary(_cells(rows), text.getvalue().encode(), _plot(job, trials, costs))


def _row(job: TuneJob, trial: TrialResult, cost: NetworkCost) -> dict[str, Any]:
    own = trial_job(job, trial.values)
    images_per_s = trial.metrics.get(RATE, 0.0) * own.train.images_per_worker * own.cluster.max_workers
    return {
        **{key.rpartition(".")[2]: value for key, value in trial.values.items()},
        "parameters": cost.parameters,
        "GFLOPs": round(cost.gflops, 3),
        "images/s": round(images_per_s, 2),
        **{name.removeprefix(VALIDATION): round(value, 4) for name, value in trial.validation.items()},
        "steps": trial.step,
        "trial": trial.name,
    }


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = list(rows[0])
    return [names, *([f"{row.get(name, '')}" for name in names] for row in rows)]


def _plot(job: TuneJob, trials: Sequence[TrialResult], costs: Sequence[NetworkCost]) -> bytes:
    """A PNG: the metric, and beside it the cost of the network, against the first searched key."""
    key, metric = next(iter(job.tune.search)), job.tune.metric
    places = [trial.values[key] for trial in trials]
    ended = [trial.model is not None for trial in trials]
    better = "less" if job.tune.mode == "min" else "more"
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, heights, label in zip(
        figure.subplots(1, 2),
        ([trial.metrics[metric] for trial in trials], [cost.gflops for cost in costs]),
        (f"{metric} ({better} is better)", "GFLOPs of a patch, forward"),
        strict=True,
    ):
        for is_ended, marker, name in ((True, "o", "ended"), (False, "x", "stopped early")):
            some = [number for number, one in enumerate(ended) if one == is_ended]
            if some:
                axes.scatter([places[n] for n in some], [heights[n] for n in some], marker=marker, label=name)
        axes.scatter([places[0]], [heights[0]], s=160, facecolors="none", edgecolors="C3", label="best")
        axes.set(xlabel=key, ylabel=label)
        if all(isinstance(place, int) for place in places):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, alpha=0.3)
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
