"""Measuring models and baselines on held-out images by Ray Data: a table, and a contact sheet to look at.

The job of kind `evaluate`, seen from the driver: measure, show, keep."""

import posixpath
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import DataContext
from torch import Tensor

from corun_ray.config.jobs import EvaluateJob
from corun_ray.config.loading import dump_job
from corun_ray.config.tasks import EvaluateSection
from corun_ray.core.data.images import BadImage, decode_image, encode_png
from corun_ray.core.inference import dark_channel
from corun_ray.core.inference.memory import fit_in_memory
from corun_ray.core.inference.pictures import PictureRow, draw_grid
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.metrics.measure import Unmeasured, load_measure
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.data.actors import actor_slots, rows_of
from corun_ray.service.data.manifest import held_out, load_image
from corun_ray.service.inference.measurements import (
    Measurements,
    aligned,
    as_csv,
    as_parquet,
    comparison_cells,
    comparison_table,
    summary_cells,
    summary_table,
)
from corun_ray.service.inference.restorers import RestorerActor
from corun_ray.service.models.sources import Model, fetch_model
from corun_ray.service.models.tracking import Tracker, get_tracking_uri
from corun_ray.service.report.page import REPORT_FILE, Listing, PageSection, PictureItem, Table, render
from corun_ray.service.runs.record import JOB_FILE
from corun_ray.service.storage import Location, MissingFile, StorageError, locate
from corun_ray.service.telemetry.console import Console, duration
from corun_ray.service.weights.needed import weights_source

SHEET_ROWS = 6


@dataclass(frozen=True)
class Evaluation:
    """All that was measured."""

    measurements: Measurements
    bad_files: dict[str, str]
    """URI → reason, of images that could not be used at all."""
    unmeasured: list[str]
    """`IMAGE MODEL METRIC: reason`, of values that are missing."""
    contact_sheet: bytes
    """PNG."""


class ImageEvaluator(RestorerActor):
    """A Ray Data actor: restores images with every model and measures the results."""

    def __init__(self, shared: dict[str, Any], threads: int, section: EvaluateSection) -> None:
        super().__init__(shared, threads)
        self.section = section
        source = weights_source(section.weights)
        self.measures = {name: load_measure(name, source, self.device) for name in section.metrics}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One image's `key`, `truth` and whether it is `shown` → its `values` (models x metrics), and a `strip`."""
        key, truth_key = batch["key"][0], batch["truth"][0]
        values = np.full((len(self.section.names), len(self.measures)), np.nan)
        unmeasured: list[str] = []
        error, strip = "", b""
        try:
            hazy = to_tensor(load_image(self.section.hazy, key)).to(self.device)
            truth = None
            if self.section.clear is not None:
                truth = to_tensor(load_image(self.section.clear, truth_key)).to(self.device)
            pictures = self._pictures(hazy)
            values, unmeasured = self._measured(key, pictures, truth)
            if batch["shown"][0]:
                strip = encode_png(np.concatenate([to_image(picture) for picture in pictures.values()], 1))
        except (BadImage, MissingFile, ValueError) as reason:
            error = str(reason)
        cells = {"key": key, "error": error, "unmeasured": "\n".join(unmeasured), "strip": strip}
        row = {name: np.array([cell], dtype=object) for name, cell in cells.items()}
        return {**row, "values": values[None]}

    def _pictures(self, hazy: Tensor) -> dict[str, Tensor]:
        """What each baseline and model makes of an image: the pictures that a user gets, of 8 bits."""
        pictures = {"hazy": hazy}
        if "dark_channel" in self.section.baselines:
            scene = dark_channel.dehaze(hazy[0].permute(1, 2, 0).cpu().numpy())
            pictures["dark_channel"] = torch.from_numpy(scene).permute(2, 0, 1)[None].to(self.device)
        for name in self.section.models:
            pictures[name] = restore(fit_in_memory(self.networks[name], hazy, self.memory_mib), hazy).scene
        return {name: (pictures[name] * 255).round() / 255 for name in self.section.names}

    def _measured(self, key: str, pictures: Mapping[str, Tensor], truth: Tensor | None) -> tuple[np.ndarray, list[str]]:
        values, unmeasured = np.full((len(pictures), len(self.measures)), np.nan), []
        for row, (model, picture) in enumerate(pictures.items()):
            for column, (metric, measure) in enumerate(self.measures.items()):
                try:
                    values[row, column] = measure(picture, truth)
                except Unmeasured as reason:
                    unmeasured.append(f"{key} {model} {metric}: {reason}")
        return values, unmeasured


def evaluate(
    section: EvaluateSection,
    pairs: list[tuple[str, str | None]],
    models: dict[str, Model],
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures every baseline and network; unusable images, and values that are missing, are named in the result.

    `pairs` are what `held_out` found in the section's folders. Raises `StorageError`.
    """
    DataContext.get_current().enable_progress_bars = False
    shared = {name: ray.put(model) for name, model in models.items()}
    spacing = max(1, len(pairs) // SHEET_ROWS)
    shown = {key for key, _ in pairs[::spacing][:SHEET_ROWS]}
    items = [{"key": key, "truth": truth or "", "shown": key in shown} for key, truth in pairs]
    slots, threads = actor_slots(len(items))
    rows = rows_of(
        ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
            ImageEvaluator, batch_size=1, fn_constructor_args=(shared, threads, section), **slots
        )
    )
    values: dict[str, np.ndarray] = {}
    bad_files, unmeasured, strips = {}, [], {}
    for done, row in enumerate(rows, 1):
        if row["error"]:
            bad_files[posixpath.join(section.hazy, row["key"])] = row["error"]
        else:
            values[row["key"]] = row["values"]
        unmeasured += row["unmeasured"].splitlines()
        if row["strip"]:
            strips[row["key"]] = row["strip"]
        if progress:
            progress(done, len(pairs))
    if not values:
        raise StorageError(f"evaluate.hazy: not one of the {len(pairs)} images could be used: {bad_files}")
    images = sorted(values)
    cube = np.stack([values[key] for key in images])
    measurements = Measurements(images, list(section.names), list(section.metrics), cube)
    return Evaluation(measurements, bad_files, sorted(unmeasured), _contact_sheet(section, dict(pairs), strips))


def _contact_sheet(section: EvaluateSection, truths: dict[str, str | None], strips: dict[str, bytes]) -> bytes:
    rows = []
    for key, strip in sorted(strips.items()):
        pictures = np.split(decode_image(strip), len(section.names), axis=1)
        row: PictureRow = dict(zip(section.names, pictures, strict=True))
        truth = truths[key]
        if section.clear is not None and truth is not None:
            row["truth"] = load_image(section.clear, truth)
        rows.append(row)
    return encode_png(draw_grid(rows, cell_px=240))


NAMED_UNMEASURED = 10


def run_evaluation(job: EvaluateJob, console: Console) -> Evaluation:
    """Measures the job's models; leaves tables and a contact sheet.

    Raises the errors of `held_out` and `fetch_model` before anything is started, then those of `evaluate`.
    """
    started = time.monotonic()
    section = job.evaluate
    pairs = held_out(section.hazy, section.clear, "evaluate")
    models = {name: fetch_model(source, get_tracking_uri(job)) for name, source in section.models.items()}
    place = cluster.connect(job.cluster)
    run_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run, tracker = locate(job.storage).child(run_id), Tracker(job, run_id)
    facts = {
        "images": section.hazy + (f" against {section.clear}" if section.clear else ", without a truth"),
        "models": ", ".join(f"{name} ({source})" for name, source in section.models.items()) or "none",
        "metrics": ", ".join(section.metrics),
        "on": place,
        "run": run.uri,
    }
    console.header(f"evaluate {job.name}", facts)
    succeeded = False
    try:
        found = evaluate(section, pairs, models, lambda done, total: console.progress(done, total, "image"))
        files, lines = _account(job, run, found)
        for name, content in files.items():
            run.child(name).write(content)
            tracker.log_file(name, content)
        for model, intervals in found.measurements.intervals().items():
            tracker.log_metrics(0, {f"{model}/{metric}": interval.mean for metric, interval in intervals.items()})
        succeeded = True
    finally:
        tracker.finish(succeeded)
    for line in lines:
        console.say(f"  {line}")
    results = {"table": run.child("metrics.csv").uri, "report": run.child(REPORT_FILE).uri}
    console.footer("done", {**results, "took": duration(time.monotonic() - started)})
    return found


def _account(job: EvaluateJob, run: Location, found: Evaluation) -> tuple[dict[str, bytes], list[str]]:
    """What is kept of an evaluation, file by file, and what is shown of it."""
    measurements, reference = found.measurements, job.evaluate.reference
    intervals, table = measurements.intervals(), measurements.table()
    files = {
        JOB_FILE: dump_job(job).encode(),
        "metrics.csv": as_csv(table),
        "metrics.parquet": as_parquet(table),
        "summary.csv": as_csv(summary_table(intervals)),
        "contact_sheet.png": found.contact_sheet,
    }
    means, differences = summary_cells(intervals), []
    if reference is not None and len(measurements.models) > 1:
        comparisons = measurements.comparisons(reference)
        files["comparison.csv"] = as_csv(comparison_table(comparisons, reference))
        differences = comparison_cells(comparisons)
    missing = [f"left out: {uri}: {reason}" for uri, reason in found.bad_files.items()]
    missing += [f"no value: {line}" for line in found.unmeasured[:NAMED_UNMEASURED]]
    if more := len(found.unmeasured[NAMED_UNMEASURED:]):
        missing.append(f"no value: {more} more, empty in metrics.csv")
    about_means = f"means over {len(measurements.images)} images, with 95 % bootstrap intervals"
    about_differences = f"less {reference}, image by image (p: sign-flip test)"
    sections = [
        PageSection("Result", about_means, [Table(means[0], means[1:])]),
        PageSection("Differences", about_differences, [Table([""] * 6, differences)] if differences else []),
        PageSection(
            "Pictures", "Some of the images.", [PictureItem([("contact sheet", found.contact_sheet)], is_wide=True)]
        ),
        PageSection(
            "Missing", "Images and values not in the tables.", [Listing("\n".join(missing))] if missing else []
        ),
        PageSection("Job", "The job file with every default filled in.", [Listing(dump_job(job))]),
    ]
    files[REPORT_FILE] = render(run.name, f"{len(measurements.models)} models and baselines measured.", sections)
    lines = [about_means, *aligned(means)]
    if differences:
        lines += ["", about_differences, *aligned(differences)]
    return files, lines + missing
