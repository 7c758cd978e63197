"""What `bench pool` found out, as a table, a JSON file and a plot."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corun_ray.bench.label_pool.figures import STEP_S, Level, PoolReport, Series, WorkerWaits

KB, MB = 1e3, 1e6
COLUMN = 12
LevelFigure = Callable[[Level], float]
JobFigure = Callable[[WorkerWaits], float]

LEVEL_ROWS: dict[str, dict[str, LevelFigure]] = {
    "offers of new labels, 2 processes, 15 a call": {
        "labels/s": lambda level: level.offers_per_s,
        "one with its answer, median ms": lambda level: level.offer.median_ms,
        "one with its answer, p99 ms": lambda level: level.offer.p99_ms,
    },
    "reads of labels in memory": {
        "labels/s, 2 processes, 8 a read": lambda level: level.from_memory.labels_per_s,
        "one label, median ms": lambda level: level.from_memory.one.median_ms,
        "one label, p99 ms": lambda level: level.from_memory.one.p99_ms,
    },
    "reads of labels that only storage has": {
        "labels/s, 2 processes, 8 a read": lambda level: level.from_storage.labels_per_s,
        "one label, median ms": lambda level: level.from_storage.one.median_ms,
        "one label, p99 ms": lambda level: level.from_storage.one.p99_ms,
    },
    "memory for each label of the pool": {
        "images, by the pool's counters, kB": lambda level: level.memory.counted_bytes_per_label / KB,
        "growth of the object store, kB": lambda level: level.memory.object_store_bytes_per_label / KB,
        "index: growth of the shards, kB": lambda level: level.memory.index_bytes_per_label / KB,
    },
    "full snapshot, sum of the rounds": {
        "holds the step up, s": lambda level: level.full_save.freeze_s,
        "beside the training, s": lambda level: level.full_save.finish_s,
        "written, MB": lambda level: level.full_save.written_bytes / MB,
    },
    "snapshot after 1 % of labels were replaced": {
        "holds the step up, s": lambda level: level.small_save.freeze_s,
        "beside the training, s": lambda level: level.small_save.finish_s,
        "written, MB": lambda level: level.small_save.written_bytes / MB,
    },
    "restoring a full snapshot by new shards": {
        "start of the processes, s": lambda level: level.restore.start_s,
        "index read, s": lambda level: level.restore.index_s,
        "first read, s": lambda level: level.restore.first_read_s,
        "labels of that read": lambda level: level.restore.first_read_labels,
    },
}
JOB_ROWS: dict[str, JobFigure] = {
    "blocked by the pool, median ms": lambda job: job.blocked.median_ms,
    "blocked by the pool, mean ms": lambda job: job.blocked.mean_ms,
    "blocked by the pool, p99 ms": lambda job: job.blocked.p99_ms,
    "blocked, mean share of a step, %": lambda job: 100 * job.blocked_share_of_step,
    "processor time of the worker in them, mean ms": lambda job: 1000 * job.worker_cpu_s_per_step,
    "steps that began late, %": lambda job: 100 * job.late_share_of_steps,
    "processor time of all shards a step, s": lambda job: job.shard_cpu_s_per_step,
}
JOBS: dict[str, Callable[[Series], WorkerWaits | None]] = {
    "steps begin at different times, labels in memory": lambda series: series.job,
    "all steps begin at once, labels in memory": lambda series: series.job_in_lockstep,
    "steps begin at different times, any labels": lambda series: series.job_beyond_memory,
}
PANELS: dict[str, tuple[LevelFigure, ...]] = {
    "offers, labels/s": (lambda level: level.offers_per_s,),
    "read of one label, median ms\n(dashed: from storage)": (
        lambda level: level.from_memory.one.median_ms,
        lambda level: level.from_storage.one.median_ms,
    ),
    "memory for each label, kB\n(dashed: index)": (
        lambda level: level.memory.object_store_bytes_per_label / KB,
        lambda level: level.memory.index_bytes_per_label / KB,
    ),
    "full snapshot, s": (lambda level: level.full_save.freeze_s + level.full_save.finish_s,),
    "snapshot after 1 % of labels were replaced, s\n(dashed: what holds the step up)": (
        lambda level: level.small_save.freeze_s + level.small_save.finish_s,
        lambda level: level.small_save.freeze_s,
    ),
    "restoring the index, s": (lambda level: level.restore.index_s,),
}
LINES = ("-", "--")


def table(report: PoolReport) -> str:
    """The figures of the full pools, a column for each number of shards, under a caption."""
    lines = []

    def section(title: str, rows: dict[str, list[float]]) -> None:
        lines.append(title)
        lines.extend(f"  {name:<38}" + "".join(f"{number(v):>{COLUMN}}" for v in row) for name, row in rows.items())

    last = [series.levels[-1] for series in report.series]
    for title, figures in LEVEL_ROWS.items():
        section(title, {name: [figure(level) for level in last] for name, figure in figures.items()})
    for title, job_of in JOBS.items():
        jobs = [job for series in report.series if (job := job_of(series)) is not None]
        if len(jobs) == len(report.series):
            workers = f"{report.settings.workers} workers, {STEP_S:g} s a step; {title}"
            section(workers, {name: [figure(job) for job in jobs] for name, figure in JOB_ROWS.items()})
    heading = " " * 40 + "".join(f"{_shards(series):>{COLUMN}}" for series in report.series)
    return "\n".join([*_caption(report), "", heading, *lines])


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.4f}"


def as_json(report: PoolReport) -> str:
    """Every figure of every level, and the machine that it comes from."""
    return json.dumps(asdict(report), indent=1) + "\n"


def plot(report: PoolReport) -> bytes:
    """A PNG: how costs grow with the labels in the pool, a panel for each, a line for each number of shards."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True)
    for axes, (title, figures) in panels:
        _draw(axes, report, figures)
        axes.set(title=title, xlabel="labels in the pool")
    settings = report.settings
    figure.suptitle(
        f"label pool, {settings.side_px} px, {settings.encoding}, {settings.memory_mib:,} MiB of memory for labels, "
        f"{report.machine['cores']} cores"
    )
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw(axes: Axes, report: PoolReport, figures: Sequence[LevelFigure]) -> None:
    drawn = []
    for turn, series in enumerate(report.series):
        for figure_of, line in zip(figures, LINES, strict=False):
            values = [figure_of(level) for level in series.levels]
            name = _shards(series) if line == LINES[0] else None
            labels = [level.labels for level in series.levels]
            axes.plot(labels, values, line, marker="o", markersize=4, color=f"C{turn}", label=name)
            drawn += [value for value in values if value > 0]
    axes.set(xscale="log", yscale="log")
    if drawn:
        # Whole decades, at least one: noise must not look like a trend.
        axes.set_ylim(10 ** math.floor(math.log10(min(drawn)) - 0.01), 10 ** math.ceil(math.log10(max(drawn)) + 0.01))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: number(value))
        axis.set_minor_formatter("")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()


def _shards(series: Series) -> str:
    return f"{series.shards} shard{'s' * (series.shards > 1)}"


def float32_bytes(side_px: int) -> int:
    """A label with transmission and trust map, not encoded: five planes of four bytes a pixel."""
    return 5 * 4 * side_px**2


def _caption(report: PoolReport) -> list[str]:
    settings, machine = report.settings, report.machine
    return [
        f"Label pool with {settings.labels:,} labels of {settings.side_px} px in {settings.encoding}; memory for "
        f"{settings.memory_mib:,} MiB of them, the others in storage.",
        f"In float32 with a trust map a label would take {float32_bytes(settings.side_px) / KB:,.0f} kB of memory.",
        "The pool was filled in rounds, each ended by a snapshot of what was new: the full snapshot is their sum.",
        f"{machine['cores']} cores, {float(machine['memory_bytes']) / 2**30:.0f} GiB of memory; Python "
        f"{machine['python']}, Ray {machine['ray']}, pyarrow {machine['pyarrow']}; {report.wall_s:.0f} s in all.",
    ]
