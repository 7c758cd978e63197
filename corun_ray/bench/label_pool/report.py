"""Present the results of `bench pool` as a table, a JSON file and a plot."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corun_ray.bench.label_pool.figures import STEP_S, Level, PoolReport, Series, WorkerWaits
from corun_ray.service.telemetry.tables import format_table

T = TypeVar("T")

KB, MB = 1e3, 1e6
GIB = 2**30

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
    "reads of labels that are only in storage": {
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
        "delays the step, s": lambda level: level.full_save.freeze_s,
        "beside the training, s": lambda level: level.full_save.finish_s,
        "written, MB": lambda level: level.full_save.written_bytes / MB,
    },
    "snapshot after 1 % of labels were replaced": {
        "delays the step, s": lambda level: level.small_save.freeze_s,
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
"""Title of a section of the table → name of a row → figure of a full pool."""
JOB_ROWS: dict[str, JobFigure] = {
    "blocked by the pool, median ms": lambda job: job.blocked.median_ms,
    "blocked by the pool, mean ms": lambda job: job.blocked.mean_ms,
    "blocked by the pool, p99 ms": lambda job: job.blocked.p99_ms,
    "blocked, mean share of a step, %": lambda job: 100 * job.blocked_share_of_step,
    "processor time of the worker in them, mean ms": lambda job: 1000 * job.worker_cpu_s_per_step,
    "steps that began late, %": lambda job: 100 * job.late_share_of_steps,
    "processor time of all shards a step, s": lambda job: job.shard_cpu_s_per_step,
}
"""Name of a row → figure of a simulated job."""
JOBS: dict[str, Callable[[Series], WorkerWaits | None]] = {
    "steps begin at different times, labels in memory": lambda series: series.job,
    "all steps begin at once, labels in memory": lambda series: series.job_in_lockstep,
    "steps begin at different times, any labels": lambda series: series.job_beyond_memory,
}
"""Title of a simulated job → the job."""
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
    "snapshot after 1 % of labels were replaced, s\n(dashed: delay of the step)": (
        lambda level: level.small_save.freeze_s + level.small_save.finish_s,
        lambda level: level.small_save.freeze_s,
    ),
    "restoring the index, s": (lambda level: level.restore.index_s,),
}
"""Title of a panel of the plot → its figures, one for each style of line."""
LINE_STYLES = ("-", "--")


# --- Table ---


def format_report(report: PoolReport) -> str:
    """Return a table of the full pools with a caption.

    Each number of shards has a column.
    """
    # Collect the sections: title → rows of cells. The last level is the full pool.
    sections: dict[str, list[list[str]]] = {}
    full_pools = [series.levels[-1] for series in report.series]
    for title, level_figures in LEVEL_ROWS.items():
        sections[title] = _list_rows(level_figures, full_pools)

    # A job beyond memory only exists where memory does not hold all labels.
    for title, select_job in JOBS.items():
        jobs = []
        for series in report.series:
            job = select_job(series)
            if job is not None:
                jobs.append(job)
        if len(jobs) == len(report.series):
            workers = f"{report.settings.workers} workers, {STEP_S:g} s a step; {title}"
            sections[workers] = _list_rows(JOB_ROWS, jobs)

    # Align all rows together, so that the sections have the same columns.
    header = ["", *map(_name_shards, report.series)]
    all_rows = [*itertools.chain.from_iterable(sections.values())]
    heading, *aligned = format_table(all_rows, header, right=range(1, len(header)), indent="  ").split("\n")

    # Put each title above its rows.
    lines = [*_write_caption(report), "", heading]
    for title, rows in sections.items():
        lines += [title, *aligned[: len(rows)]]
        aligned = aligned[len(rows) :]
    return "\n".join(lines)


def _list_rows(figures: Mapping[str, Callable[[T], float]], sources: Sequence[T]) -> list[list[str]]:
    """Return a row for each figure: its name, then a cell for each source."""
    rows = []
    for name, figure in figures.items():
        rows.append([name, *(format_number(figure(source)) for source in sources)])
    return rows


def _write_caption(report: PoolReport) -> list[str]:
    """Return lines that describe the pool, the machine and the measurement."""
    settings = report.settings
    machine = report.machine
    return [
        f"Label pool with {settings.labels:,} labels of {settings.side_px} px in {settings.encoding}; memory for "
        f"{settings.memory_mib:,} MiB of them, the others in storage.",
        f"In float32 with a trust map a label would take {count_float32_bytes(settings.side_px) / KB:,.0f} kB of "
        "memory.",
        "The pool was filled in rounds, each ended by a snapshot of the new labels: the full snapshot is their sum.",
        f"{machine['cores']} cores, {float(machine['memory_bytes']) / GIB:.0f} GiB of memory; Python "
        f"{machine['python']}, Ray {machine['ray']}, pyarrow {machine['pyarrow']}; {report.wall_s:.0f} s in all.",
    ]


def count_float32_bytes(side_px: int) -> int:
    """Return the bytes of a label that is not encoded.

    Such a label has five planes (scene, transmission, trust map) of four bytes a pixel.
    """
    return 5 * 4 * side_px**2


def format_number(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.4f}"


def _name_shards(series: Series) -> str:
    return "1 shard" if series.shards == 1 else f"{series.shards} shards"


# --- JSON ---


def format_json(report: PoolReport) -> str:
    """Return every figure and the machine as JSON."""
    return json.dumps(asdict(report), indent=1) + "\n"


# --- Plot ---


def plot(report: PoolReport) -> bytes:
    """Plot costs over the labels in the pool; return a PNG.

    Each figure has a panel, each number of shards a line.
    """
    figure = Figure(figsize=(14, 8), layout="constrained")
    # One panel for each figure.
    panels = zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True)
    for axes, (title, figures) in panels:
        _draw_panel(axes, report, figures)
        axes.set(title=title, xlabel="labels in the pool")

    settings = report.settings
    figure.suptitle(
        f"label pool, {settings.side_px} px, {settings.encoding}, {settings.memory_mib:,} MiB of memory for labels, "
        f"{report.machine['cores']} cores"
    )

    # Encode the figure.
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_panel(axes: Axes, report: PoolReport, figures: Sequence[LevelFigure]) -> None:
    """Draw one panel.

    Each number of shards has a colour, each figure a style of line.
    """
    positive = []
    for number, series in enumerate(report.series):
        labels = [level.labels for level in series.levels]
        for level_figure, style in zip(figures, LINE_STYLES, strict=False):
            # The legend names each colour once.
            name = _name_shards(series) if style == LINE_STYLES[0] else None
            values = [level_figure(level) for level in series.levels]
            axes.plot(labels, values, style, marker="o", markersize=4, color=f"C{number}", label=name)
            positive += [value for value in values if value > 0]

    # Both axes are logarithmic. Show whole decades, at least one: noise must not look like a trend. Zero has no
    # logarithm.
    axes.set(xscale="log", yscale="log")
    if positive:
        lowest = math.floor(math.log10(min(positive)) - 0.01)
        highest = math.ceil(math.log10(max(positive)) + 0.01)
        axes.set_ylim(10**lowest, 10**highest)

    # Numbers without exponents, at whole decades alone.
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: format_number(value))
        axis.set_minor_formatter("")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
