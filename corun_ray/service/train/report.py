"""The report of a training run: what became of its validation images, its curves, its pool, and how it was made."""

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
from corun_ray.core.metrics.catalog import list_metrics
from corun_ray.core.training.checkpoints import load_network
from corun_ray.service.models.card import read_code_version
from corun_ray.service.report.charts import Points, draw_line_chart
from corun_ray.service.report.page import Charts, Listing, PageSection, PictureItem, Slider, Table, render
from corun_ray.service.report.statistics import estimate_interval
from corun_ray.service.runs.held_out import (
    Example,
    ValidationLog,
    find_pictured_steps,
    read_example,
    select_always_pictured,
)
from corun_ray.service.storage import Location

SLIDERS, STEPS_SHOWN, STAGE_IMAGES = 6, 6, 2
EXTREME_CELL_PX, STAGE_CELL_PX, STAGE_IMAGE_PX = 320, 300, 400
LIBRARIES = ("torch", "ray", "mlflow", "numpy", "opencv-python-headless", "pyarrow", "pyiqa")

CHARTS = {
    "Losses": ("loss/",),
    "Learning rate": ("optim/lr",),
    "Steps per second": ("rate/steps_per_s",),
}
POOL_CHARTS = {
    "Labels in the pool": ("pool/labels",),
    "Share of candidates that won": ("pool/win_rate",),
    "Trust in the labels": ("pool/trust",),
}


def build_training_report(
    job: TrainingJob,
    run: Location,
    checkpoint: Path,
    facts: Mapping[str, str],
    curves: Mapping[str, Points],
    log: ValidationLog,
) -> bytes:
    """The page; `facts` are what the run told at its begin, `curves` its metrics over the steps.

    Raises `StorageError`.
    """
    pictured = find_pictured_steps(run)
    shown = select_always_pictured(pictured)[:SLIDERS]
    last = log.last_step
    sections = [
        PageSection("Result", "Held-out images after the last step, with 95 % bootstrap intervals.", _result(log)),
        PageSection("Before and after", "Drag over a picture, or the bar below it.", _sliders(run, pictured, shown)),
        PageSection("Best and worst", "By each metric, after the last step.", _extremes(run, log, pictured)),
        PageSection("Curves", "Every value that was logged.", _charts(curves, CHARTS) + _validation_charts(curves)),
        PageSection("Label pool", "How it grew, and what share of the candidates won.", _charts(curves, POOL_CHARTS)),
        PageSection(
            "Stages", "What each stage of the network makes of an image.", _stages(run, checkpoint, shown, last)
        ),
        PageSection("Job", "The job file with every default filled in.", [Listing(dump_job(job))]),
        PageSection("Environment", "Where it ran, and with what.", [_environment(facts)]),
    ]
    summary = f"{job.kind}, {job.train.steps} steps, {facts['data']}."
    return render(run.name, summary, sections)


def _result(log: ValidationLog) -> list[Table]:
    if log.last_step is None:
        return []
    rows = []
    for (prefix, metric), images in log.at(log.last_step).items():
        found = estimate_interval(np.array([*images.values()]))
        better = "less" if list_metrics()[metric].lower_better else "more"
        rows.append([f"{prefix}/{metric}", f"{found.mean:.4f}", found.span, str(found.count), better])
    return [Table(["metric", "mean", "interval", "images", "better is"], rows)]


def _sliders(run: Location, pictured: Mapping[str, Sequence[int]], shown: Sequence[str]) -> list[Slider]:
    sliders = []
    for name in shown:
        steps = pictured[name]
        some = sorted({steps[round(place)] for place in np.linspace(0, len(steps) - 1, STEPS_SHOWN)})
        examples = [(step, read_example(run, name, step)) for step in some]
        sliders.append(Slider(name, examples[0][1].hazy, [(f"step {step}", one.output) for step, one in examples]))
    return sliders


def _extremes(run: Location, log: ValidationLog, pictured: Mapping[str, Sequence[int]]) -> list[PictureItem]:
    last = log.last_step
    if last is None:
        return []
    found = []
    for (prefix, metric), images in log.at(last).items():
        known = [image for image, value in images.items() if not math.isnan(value)]
        ranked = sorted(known, key=images.__getitem__, reverse=not list_metrics()[metric].lower_better)
        for word, image in (("best", ranked[0]), ("worst", ranked[-1])) if ranked else ():
            name = f"{prefix}/{image}"
            if last in pictured.get(name, ()):
                both = _side_by_side(read_example(run, name, last))
                found.append((f"{word} {prefix}/{metric} {images[image]:.4f}: {image}", both))
    return [PictureItem(found)] if found else []


def _side_by_side(one: Example) -> bytes:
    row = {"hazy": decode_image(one.hazy), "restored": decode_image(one.output)}
    return encode_thumbnail(draw_grid([row], EXTREME_CELL_PX), 2 * EXTREME_CELL_PX + 40)


def _charts(curves: Mapping[str, Points], wanted: Mapping[str, Sequence[str]]) -> list[Charts]:
    svgs = []
    for title, names in wanted.items():
        lines = {name.rpartition("/")[2]: curves[name] for name in curves if name.startswith(tuple(names))}
        if lines:
            svgs.append(draw_line_chart(title, lines))
    return [Charts(svgs)] if svgs else []


def _validation_charts(curves: Mapping[str, Points]) -> list[Charts]:
    """A metric each, a line for each set of held-out images."""
    by_metric: dict[str, dict[str, Points]] = {}
    for name, points in curves.items():
        prefix, _, metric = name.rpartition("/")
        if name.startswith("val/"):
            by_metric.setdefault(metric, {})[prefix] = points
    svgs = [draw_line_chart(f"Held-out {metric}", lines) for metric, lines in sorted(by_metric.items())]
    return [Charts(svgs)] if svgs else []


def _stages(run: Location, checkpoint: Path, shown: Sequence[str], last: int | None) -> list[PictureItem]:
    network = load_network(checkpoint).network
    if last is None or not hasattr(network, "unfold"):
        return []
    pictures = []
    for name in shown[:STAGE_IMAGES]:
        tensor = to_tensor(
            decode_image(encode_thumbnail(decode_image(read_example(run, name, last).hazy), STAGE_IMAGE_PX))
        )
        rows = build_stage_rows(restore_stages(network, tensor), tensor)
        pictures.append((name, encode_png(draw_grid(list(rows.values()), STAGE_CELL_PX, list(rows)))))
    return [PictureItem(pictures, is_wide=True)] if pictures else []


def _environment(facts: Mapping[str, str]) -> Table:
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    cluster = ", ".join(f"{amount:g} {kind}" for kind in ("CPU", "GPU") if (amount := resources.get(kind)))
    rows = {
        **facts,
        "cluster": cluster,
        "code": read_code_version(),
        "driver": f"{socket.gethostname()}, {platform.platform()}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }
    return Table(["", ""], [[name, text] for name, text in rows.items()])
