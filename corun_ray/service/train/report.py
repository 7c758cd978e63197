"""The report of a training run: validation images, curves, label pool, and how the run was made."""

import math
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import ray

from corun_ray.config.jobs import TrainingJob
from corun_ray.config.loading import dump_job
from corun_ray.core.data.images import decode_image, encode_png
from corun_ray.core.inference.pictures import build_stage_rows, draw_grid, encode_thumbnail
from corun_ray.core.inference.restore import restore_stages, to_tensor
from corun_ray.core.metrics.catalog import list_validation_metrics
from corun_ray.core.training.checkpoints import load_network
from corun_ray.service.models.card import read_code_version
from corun_ray.service.report.charts import Points, draw_line_chart
from corun_ray.service.report.page import Charts, Listing, PageSection, PictureItem, Slider, Table, render
from corun_ray.service.report.statistics import describe_gap, estimate_interval
from corun_ray.service.runs.held_out import (
    Example,
    ValidationLog,
    find_pictured_steps,
    read_example,
    select_always_pictured,
)
from corun_ray.service.storage import Location
from corun_ray.service.train.best import BestCheckpoint

MAX_SLIDERS = 6
MAX_NAMED_GAPS = 5
"""Images without a finite value that the page names for each metric."""
MAX_SLIDER_STEPS = 6
MAX_STAGE_IMAGES = 2
EXTREME_CELL_PX, STAGE_CELL_PX, STAGE_IMAGE_PX = 320, 300, 400
EXTREME_MARGIN_PX = 40
"""Gaps and headings of the picture of one best or worst image."""
LIBRARIES = ("torch", "ray", "mlflow", "numpy", "opencv-python-headless", "pyarrow", "pyiqa")

CHARTS = {
    "Losses": "loss/",
    "Learning rate": "optim/lr",
    "Steps per second": "rate/steps_per_s",
}
"""Title of a chart → how the names of its metrics begin."""
POOL_CHARTS = {
    "Labels in the pool": "pool/labels",
    "Share of candidates that won": "pool/win_rate",
    "Trust in the labels": "pool/trust",
}


def build_training_report(
    job: TrainingJob,
    run: Location,
    checkpoint: Path,
    facts: Mapping[str, str],
    curves: Mapping[str, Points],
    log: ValidationLog,
    best: BestCheckpoint | None = None,
) -> bytes:
    """Build the HTML page of a run.

    `run` is the run's folder, `checkpoint` a local copy of its last checkpoint. `facts` are those of the console's
    header, `curves` the run's metrics over the steps, `log` its validations, `best` its best checkpoint.

    Raises `StorageError`.
    """
    # The images that the job has chosen have pictures of every validation.
    pictured = find_pictured_steps(run)
    chosen = select_always_pictured(pictured)[:MAX_SLIDERS]
    sliders = _make_sliders(run, pictured, chosen)
    curve_charts = _draw_charts(curves, CHARTS) + _draw_validation_charts(curves)

    stages = _picture_stages(run, checkpoint, chosen, log.last_step)

    result_note = "Validation images after the last step, with 95 % bootstrap intervals."
    if best is not None:
        result_note += f" The best checkpoint: {best.describe()}."
    sections = [
        PageSection("Result", result_note, [*_tabulate_result(log), *_list_left_out(log)]),
        PageSection("Before and after", "Drag over a picture, or the bar below it.", sliders),
        PageSection("Best and worst", "By each metric, after the last step.", _picture_extremes(run, log, pictured)),
        PageSection("Curves", "Every logged value.", curve_charts),
        PageSection("Label pool", "Growth, and the share of candidates that won.", _draw_charts(curves, POOL_CHARTS)),
        PageSection("Stages", "The image after each stage of the network.", stages),
        PageSection("Job", "The job file with every default filled in.", [Listing(dump_job(job))]),
        PageSection("Environment", "Machines and versions of the run.", [_tabulate_environment(facts)]),
    ]
    summary = f"{job.kind}, {job.train.steps} steps, {facts['data']}."
    return render(run.name, summary, sections)


# --- Validation images ---


def _tabulate_result(log: ValidationLog) -> list[Table]:
    """List the means of the last validation, if there is one."""
    if log.last_step is None:
        return []

    rows = []
    for (prefix, metric), images in log.at(log.last_step).items():
        found = estimate_interval(np.array([*images.values()]))
        better = "less" if list_validation_metrics()[metric].lower_better else "more"
        rows.append([f"{prefix}/{metric}", f"{found.mean:.4f}", found.span, str(found.count), better])
    return [Table(["metric", "mean", "interval", "images", "better is"], rows)]


def _list_left_out(log: ValidationLog) -> list[Listing]:
    """List the images that have no part in a mean of the last validation."""
    if log.last_step is None:
        return []

    lines = []
    for (prefix, metric), images in log.at(log.last_step).items():
        gaps = [f"{image} ({describe_gap(value)})" for image, value in images.items() if not math.isfinite(value)]
        if not gaps:
            continue
        more = len(gaps) - MAX_NAMED_GAPS
        named = gaps[:MAX_NAMED_GAPS] + ([f"{more} more"] if more > 0 else [])
        lines.append(f"{prefix}/{metric}: {len(gaps)} of {len(images)} images left out: {', '.join(named)}")
    return [Listing("\n".join(lines))] if lines else []


def _make_sliders(run: Location, pictured: Mapping[str, Sequence[int]], images: Sequence[str]) -> list[Slider]:
    """Make a slider for each image; `pictured` is image → steps."""
    sliders = []
    for name in images:
        # Evenly spread steps, the first and the last among them.
        steps = pictured[name]
        places = np.linspace(0, len(steps) - 1, MAX_SLIDER_STEPS)
        some = sorted({steps[round(place)] for place in places})

        examples = [(step, read_example(run, name, step)) for step in some]
        after = [(f"step {step}", example.output) for step, example in examples]
        sliders.append(Slider(name, examples[0][1].hazy, after))
    return sliders


def _picture_extremes(run: Location, log: ValidationLog, pictured: Mapping[str, Sequence[int]]) -> list[PictureItem]:
    """Show the best and the worst image by each metric."""
    last = log.last_step
    if last is None:
        return []

    pictures = []
    for (prefix, metric), values in log.at(last).items():
        # Rank the images that have a value, the best first.
        known = [image for image, value in values.items() if not math.isnan(value)]
        known.sort(key=values.__getitem__, reverse=not list_validation_metrics()[metric].lower_better)
        if not known:
            continue

        for word, image in (("best", known[0]), ("worst", known[-1])):
            name = f"{prefix}/{image}"
            if last in pictured.get(name, ()):
                caption = f"{word} {prefix}/{metric} {values[image]:.4f}: {image}"
                pictures.append((caption, _draw_side_by_side(read_example(run, name, last))))
    return [PictureItem(pictures)] if pictures else []


def _draw_side_by_side(example: Example) -> bytes:
    """Draw an image and its restoration beside each other, as JPEG."""
    row = {"hazy": decode_image(example.hazy), "restored": decode_image(example.output)}
    return encode_thumbnail(draw_grid([row], EXTREME_CELL_PX), 2 * EXTREME_CELL_PX + EXTREME_MARGIN_PX)


# --- Curves ---


def _draw_charts(curves: Mapping[str, Points], wanted: Mapping[str, str]) -> list[Charts]:
    """Draw a chart for each title whose metrics were logged."""
    svgs = []
    for title, start in wanted.items():
        lines = {name.rpartition("/")[2]: points for name, points in curves.items() if name.startswith(start)}
        if lines:
            svgs.append(draw_line_chart(title, lines))
    return [Charts(svgs)] if svgs else []


def _draw_validation_charts(curves: Mapping[str, Points]) -> list[Charts]:
    """Draw a chart for each metric, with one line for each validation set."""
    by_metric: dict[str, dict[str, Points]] = {}
    for name, points in curves.items():
        prefix, _, metric = name.rpartition("/")
        if name.startswith("val/"):
            by_metric.setdefault(metric, {})[prefix] = points

    svgs = [draw_line_chart(f"Validation {metric}", lines) for metric, lines in sorted(by_metric.items())]
    return [Charts(svgs)] if svgs else []


# --- Network and environment ---


def _picture_stages(run: Location, checkpoint: Path, images: Sequence[str], last: int | None) -> list[PictureItem]:
    """Show the first images after each stage of the network.

    Nothing for a network without stages.
    """
    network = load_network(checkpoint).network
    if last is None or not hasattr(network, "unfold"):
        return []

    pictures = []
    for name in images[:MAX_STAGE_IMAGES]:
        # A small copy of the hazy image is enough for the size of the cells.
        hazy = decode_image(read_example(run, name, last).hazy)
        tensor = to_tensor(decode_image(encode_thumbnail(hazy, STAGE_IMAGE_PX)))
        rows = build_stage_rows(restore_stages(network, tensor), tensor)
        pictures.append((name, encode_png(draw_grid(list(rows.values()), STAGE_CELL_PX, list(rows)))))
    return [PictureItem(pictures, is_wide=True)] if pictures else []


def _tabulate_environment(facts: Mapping[str, str]) -> Table:
    """List the run's facts, cluster, and versions of code and libraries."""
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    amounts = []
    for kind in ("CPU", "GPU"):
        amount = resources.get(kind)
        if amount:
            amounts.append(f"{amount:g} {kind}")

    rows = {
        **facts,
        "cluster": ", ".join(amounts),
        "code": read_code_version(),
        "driver": f"{socket.gethostname()}, {platform.platform()}, Python {platform.python_version()}",
        "libraries": ", ".join([f"{name} {version(name)}" for name in LIBRARIES]),
    }
    return Table(["", ""], [[name, text] for name, text in rows.items()])
