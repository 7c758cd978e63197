"""Evaluation by Ray Data: measure models and baselines on a folder of images, compare them, show the images.

`evaluate` measures. `run_evaluation` is the job of kind `evaluate`, which also writes tables, a contact sheet and a
report.
"""

import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
from corun_ray.core.inference.overlapping import Tiling, find_worse
from corun_ray.core.inference.pictures import BACKGROUND, PictureRow, draw_grid
from corun_ray.core.inference.restore import to_image, to_tensor
from corun_ray.core.metrics.measure import Unmeasured, load_measure
from corun_ray.core.networks.corun import restore_by_closed_form
from corun_ray.core.networks.finite import NotFinite
from corun_ray.service.cluster.join import join_cluster
from corun_ray.service.data.actors import iterate_rows, plan_actor_pool
from corun_ray.service.data.annotations import Truth
from corun_ray.service.data.inspection import Inspector
from corun_ray.service.data.manifest import (
    load_image,
    load_truth,
    pair_validation_images,
    refuse_misfits,
    use_folders,
)
from corun_ray.service.data.results import ResultImages, find_results
from corun_ray.service.data.unusable import join_first_reasons
from corun_ray.service.errors import JobFailed
from corun_ray.service.inference.detection import DetectionResult, PictureDetector, assess_detections, plan_detection
from corun_ray.service.inference.measurements import (
    Comparisons,
    Intervals,
    Measurements,
    build_comparison_table,
    build_interval_table,
    encode_csv,
    encode_parquet,
    format_comparisons,
    format_intervals,
)
from corun_ray.service.inference.outcome import merge_reasons, name_passed_over
from corun_ray.service.inference.restorers import RestorerActor, read_tilings
from corun_ray.service.models.sources import Model, fetch_model
from corun_ray.service.models.tracking import Tracker, get_tracking_uri
from corun_ray.service.report.page import REPORT_FILE, Listing, PageSection, PictureItem, Table, render
from corun_ray.service.runs.record import JOB_FILE, create_run_folder
from corun_ray.service.storage import Location, MissingFile, StorageError, locate
from corun_ray.service.telemetry.console import Console, format_duration
from corun_ray.service.telemetry.tables import format_table
from corun_ray.service.weights.needed import open_weights

MAX_SHEET_ROWS = 6
"""Images on the contact sheet."""
SHEET_CELL_PX = 240
MAX_NAMED_UNMEASURED = 10
MAX_BLOCKS = 1000
"""Blocks of the Ray Data input."""
METRICS_FILE = "metrics.csv"
SHEET_FILE = "contact_sheet.png"


class UnusableImage(ValueError):
    """An image file that cannot be used; the message is the reason on one line."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(reason)
        self.uri = uri


@dataclass(frozen=True)
class Evaluation:
    """The result of measuring a folder of images."""

    measurements: Measurements
    bad_files: dict[str, str]
    """URI → reason, of hazy images and truths that cannot be used."""
    unmeasured: list[str]
    """`IMAGE MODEL METRIC: reason`, of missing values; `IMAGE MODEL: reason` where a result cannot be used."""
    contact_sheet: bytes
    """PNG."""
    detection: DetectionResult | None = None
    """What a detector found; None without one."""
    tilings: dict[str, Tiling] = field(default_factory=dict)
    """Model → its tiles that disagree most, of models that were restored in tiles and depend on them."""

    def list_tiles(self) -> list[str]:
        """List a line for each model whose pictures depend on tiles."""
        return [tiling.describe(name) for name, tiling in sorted(self.tilings.items())]


@dataclass(frozen=True)
class Account:
    """What an evaluation shows: means, differences from a reference, and what is missing."""

    intervals: Intervals
    comparisons: Comparisons
    """Empty without a reference."""
    means: list[list[str]]
    """A heading, then the cells of each model."""
    means_note: str
    differences: list[list[str]]
    """The cells of each comparison."""
    differences_note: str
    missing: list[str]
    """Lines about skipped images and missing values."""

    def to_lines(self) -> list[str]:
        """Return the lines to show on the console."""
        lines = [self.means_note, *format_table(self.means).splitlines()]
        if self.differences:
            lines += ["", self.differences_note, *format_table(self.differences).splitlines()]
        return lines + self.missing


# --- The work on one image, in a Ray Data actor ---


class ImageEvaluator(RestorerActor):
    """A Ray Data actor that restores images with every model, loads other methods' results, and measures all."""

    def __init__(
        self,
        models: Mapping[str, "ray.ObjectRef[Model]"],
        threads: int,
        section: EvaluateSection,
        results: Mapping[str, ResultImages],
        classes: Mapping[str, int] | None,
    ) -> None:
        """Load models, metrics and, where there are `classes` of boxes, the detector."""
        super().__init__(models, threads)
        self.section, self.results = section, results
        self.detect = None if classes is None else PictureDetector(section, classes, self.device)
        source = open_weights(section.weights)
        self.measures = {name: load_measure(name, source, self.device) for name in section.metrics}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Measure one image.

        `batch` holds the image's `key`, the key of its `truth` (empty without one), and whether it is `shown`.
        Returns `key`, an `error` (empty where all went well) of the file `bad_file`, `values` (models x metrics, NaN
        where missing), the reasons of missing values in `unmeasured`, for a shown image a `strip`: all pictures side by
        side, as PNG, with a detector its `findings` (empty where a picture is missing), and in `tilings` how far the
        networks' tiles disagreed, if they did.
        """
        key, truth_key = batch["key"][0], batch["truth"][0]
        values = np.full((len(self.section.names), len(self.measures)), np.nan)
        unmeasured: list[str] = []
        bad_file, error, strip, findings = "", "", b"", ""

        # Errors of the image are returned, so that the other images continue. A `StorageError` ends the job.
        try:
            hazy = self._load(self.section.hazy, key)
            truth = self._load_truth(truth_key, hazy)
            pictures, missing = self._restore(key, hazy)
            values, unmeasured = self._measure(key, pictures, truth)
            unmeasured += missing
            if self.detect is not None and missing:
                unmeasured.append(f"{key} {self.section.detector}: left out in every row, since a picture is missing")
            elif self.detect is not None:
                findings = self.detect(pictures)
            if batch["shown"][0]:
                strip = self._draw_strip(pictures, hazy)
        except UnusableImage as reason:
            bad_file, error = reason.uri, str(reason)
        except ValueError as reason:
            bad_file, error = posixpath.join(self.section.hazy, key), str(reason)

        # Ray Data takes columns: arrays of one row.
        row = {"values": values[None]}
        cells = {
            "key": key,
            "bad_file": bad_file,
            "error": error,
            "unmeasured": "\n".join(unmeasured),
            "strip": strip,
            "findings": findings,
            "tilings": self.take_tilings(),
        }
        for name, cell in cells.items():
            row[name] = np.array([cell], dtype=object)
        return row

    def _load_truth(self, key: str, hazy: Tensor) -> Tensor | None:
        """Load the truth of a hazy image as 1 3 H W in [0, 1].

        None where the job has no truth.

        Raises `UnusableImage`, also for a truth that does not fit the hazy image.
        """
        root = self.section.clear
        if root is None:
            return None
        height_px, width_px = hazy.shape[-2:]
        try:
            truth = load_truth(root, key, (height_px, width_px, 3), crop_truth=self.section.crop_truth)
        except (BadImage, MissingFile) as reason:
            raise UnusableImage(posixpath.join(root, key), str(reason)) from None
        return to_tensor(truth).to(self.device)

    def _load(self, root: str, key: str) -> Tensor:
        """Load an image as 1 3 H W in [0, 1].

        Raises `UnusableImage`, which names the file.
        """
        try:
            return to_tensor(load_image(root, key)).to(self.device)
        except (BadImage, MissingFile) as reason:
            raise UnusableImage(posixpath.join(root, key), str(reason)) from None

    def _load_result(self, results: ResultImages, key: str, hazy: Tensor) -> Tensor:
        """Load what another method has made of the hazy image `key`, as 1 3 H W in [0, 1].

        Raises `UnusableImage`, also for another size than the hazy image's.
        """
        result = self._load(results.root, results.images[key])
        if result.shape != hazy.shape:
            found, expected = (f"{image.shape[3]} x {image.shape[2]} px" for image in (result, hazy))
            uri = posixpath.join(results.root, results.images[key])
            raise UnusableImage(uri, f"of another size than the hazy image ({found}, not {expected})")
        return result

    def _restore(self, key: str, hazy: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        """Return the picture of each baseline and model, and the reasons of missing results.

        Pictures are 1 3 H W in [0, 1], with the levels of 8 bits, as the files that users get.
        """
        # The baselines: the image itself, CORUN without its learned networks, and the dark channel prior on the CPU.
        scenes = {"hazy": hazy}
        if "untrained" in self.section.baselines:
            with torch.no_grad():
                scenes["untrained"] = restore_by_closed_form(hazy).scene
        if "dark_channel" in self.section.baselines:
            scene = dark_channel.dehaze(hazy[0].permute(1, 2, 0).cpu().numpy())
            scenes["dark_channel"] = torch.from_numpy(scene).permute(2, 0, 1)[None].to(self.device)

        # The networks, each within this actor's memory limit. A picture that is missing takes nothing from the others.
        missing = []
        for name in self.networks:
            try:
                scenes[name] = self.restore(name, hazy, self.section.self_ensemble).scene
            except NotFinite as reason:
                missing.append(f"{key} {name}: {reason}")

        # The results of other methods.
        for name, results in self.results.items():
            try:
                scenes[name] = self._load_result(results, key, hazy)
            except UnusableImage as reason:
                missing.append(f"{key} {name}: {reason.uri}: {reason}")

        # Order the pictures as the job does, and round them to 8 bits.
        pictures = {name: (scenes[name] * 255).round() / 255 for name in self.section.names if name in scenes}
        return pictures, missing

    def _measure(self, key: str, pictures: Mapping[str, Tensor], truth: Tensor | None) -> tuple[np.ndarray, list[str]]:
        """Return all values, and the reasons of missing values.

        The values are models x metrics.
        """
        values = np.full((len(self.section.names), len(self.measures)), np.nan)
        unmeasured = []

        # A metric without a value for a picture leaves NaN and its reason.
        for model, picture in pictures.items():
            row = self.section.names.index(model)
            for column, (metric, measure) in enumerate(self.measures.items()):
                try:
                    values[row, column] = measure(picture, truth)
                except Unmeasured as reason:
                    unmeasured.append(f"{key} {model} {metric}: {reason}")
        return values, unmeasured

    def _draw_strip(self, pictures: Mapping[str, Tensor], hazy: Tensor) -> bytes:
        """Draw the pictures of an image side by side, as PNG; a missing one is blank."""
        blank = np.full((*hazy.shape[2:], 3), BACKGROUND, np.uint8)
        cells = [to_image(pictures[name]) if name in pictures else blank for name in self.section.names]
        return encode_png(np.concatenate(cells, axis=1))


# --- All images, from the driver ---


def evaluate(
    section: EvaluateSection,
    pairs: list[tuple[str, str | None]],
    models: dict[str, Model],
    results: Mapping[str, ResultImages],
    progress: Callable[[int, int], None] | None = None,
    boxes: Truth | None = None,
) -> Evaluation:
    """Measure every baseline, network and result on every image.

    `pairs` are hazy images and their truths, from `pair_validation_images`; `results` are those of `find_results`.
    Skipped images and missing values are named in the result. `progress` is called with the number of images done and
    the number of all. `boxes`, from `plan_detection`, are those that the section's detector is to find.

    Raises `StorageError`, also where no image can be used, and the errors of `assess_detections`.
    """
    # Choose the images to show: evenly spaced, so that they are from all of the folder.
    spacing = max(1, len(pairs) // MAX_SHEET_ROWS)
    shown = {key for key, _ in pairs[::spacing][:MAX_SHEET_ROWS]}
    items = [{"key": key, "truth": truth or "", "shown": key in shown} for key, truth in pairs]

    # Gather the results as they come, in any order.
    values: dict[str, np.ndarray] = {}
    bad_rows: list[tuple[str, str]] = []
    unmeasured: list[str] = []
    strips: dict[str, bytes] = {}
    findings: dict[str, str] = {}
    tilings: dict[str, Tiling] = {}
    classes = None if boxes is None else boxes.classes
    for done, row in enumerate(_measure_items(section, items, models, results, classes), 1):
        if row["error"]:
            bad_rows.append((row["bad_file"], row["error"]))
        else:
            values[row["key"]] = row["values"]
        unmeasured += row["unmeasured"].splitlines()
        if row["strip"]:
            strips[row["key"]] = row["strip"]
        if row["findings"]:
            findings[row["key"]] = row["findings"]
        for name, tiling in read_tilings(row["tilings"]).items():
            tilings[name] = find_worse(tilings.get(name), tiling) or tiling
        if progress:
            progress(done, len(pairs))

    bad_files = merge_reasons(bad_rows)
    if not values:
        reasons = join_first_reasons(bad_files)
        raise StorageError(f"evaluate.hazy: none of the {len(pairs)} images can be used ({reasons})")

    # Stack the values into images x models x metrics.
    images = sorted(values)
    cube = np.stack([values[key] for key in images])
    measurements = Measurements(images, list(section.names), list(section.metrics), cube)
    sheet = _draw_contact_sheet(section, dict(pairs), strips)
    detection = None if boxes is None else assess_detections(section, boxes, findings, strips)
    return Evaluation(measurements, bad_files, sorted(unmeasured), sheet, detection, tilings)


def _measure_items(
    section: EvaluateSection,
    items: list[dict[str, Any]],
    models: dict[str, Model],
    results: Mapping[str, ResultImages],
    classes: dict[str, int] | None,
) -> Iterator[dict[str, Any]]:
    """Start the actors; return their results one by one.

    `classes` are those that a detector is to find; None: there is no detector.

    Raises `StorageError`.
    """
    DataContext.get_current().enable_progress_bars = False
    references = {name: ray.put(model) for name, model in models.items()}
    slots, threads = plan_actor_pool(len(items))

    # The dataset must have no name here: see `iterate_rows`.
    return iterate_rows(
        ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map_batches(
            ImageEvaluator, batch_size=1, fn_constructor_args=(references, threads, section, results, classes), **slots
        )
    )


def _draw_contact_sheet(section: EvaluateSection, truths: dict[str, str | None], strips: dict[str, bytes]) -> bytes:
    """Draw a row of pictures for each shown image.

    A row has the picture of every model, then the truth.

    Returns a PNG. Raises `StorageError`.
    """
    rows = []
    for key, strip in sorted(strips.items()):
        # A strip has pictures of one width, in order of the names.
        pictures = np.split(decode_image(strip), len(section.names), axis=1)
        row: PictureRow = dict(zip(section.names, pictures, strict=True))
        truth = truths[key]
        if section.clear is not None and truth is not None:
            row["truth"] = load_truth(section.clear, truth, pictures[0].shape, crop_truth=section.crop_truth)
        rows.append(row)
    return encode_png(draw_grid(rows, cell_px=SHEET_CELL_PX))


# --- The job of kind `evaluate` ---


def run_evaluation(job: EvaluateJob, console: Console) -> Evaluation:
    """Measure the job's models; write tables and a report.

    Raises the errors of `pair_validation_images`, `refuse_misfits`, `find_results`, `fetch_model` and `plan_detection`
    before Ray starts, then `ClusterError`, `TrackingError` and the errors of `evaluate`, and `JobFailed` where MLflow
    does not take the results.
    """
    started = time.monotonic()
    section = job.evaluate

    # Find images and models before Ray starts: a mistake is reported at once.
    passed_over: dict[str, str] = {}
    pairs = pair_validation_images(section, "evaluate", job.storage, passed_over)
    section = section.model_copy(update=use_folders(section))
    refuse_misfits(section, pairs, "evaluate")
    Inspector().inspect_pairs(section, pairs, "evaluate.hazy").refuse_if_nothing_is_usable()
    keys = [hazy for hazy, _ in pairs]
    results = find_results(section, keys)
    models = {}
    for name, source in section.models.items():
        if name not in results:
            models[name] = fetch_model(source, get_tracking_uri(job))
    boxes = plan_detection(section, keys)

    results_folders = {f"evaluate.models.{name}": folder.root for name, folder in results.items()}
    place = join_cluster(job, console.say, results_folders)
    run = create_run_folder(locate(job.storage), job.name)
    tracker = Tracker(job, run.name, say=console.say)
    console.header(f"evaluate {job.name}", _describe_job(section, results, place, run))
    for uri, others in passed_over.items():
        name_passed_over(f"{others} in {uri}", console)

    # Measure, then store the results in the run's folder and in MLflow.
    succeeded = False
    try:
        evaluation = evaluate(
            section, pairs, models, results, lambda done, total: console.progress(done, total, "image"), boxes
        )
        account = _give_account(job.evaluate.reference, evaluation)
        for name, content in _make_files(job, run, evaluation, account).items():
            run.child(name).write(content)
            tracker.log_file(name, content)
        for model, row in account.intervals.items():
            means = {f"{model}/{metric}": interval.mean for metric, interval in row.items() if interval.count}
            tracker.log_metrics(0, means)
        if evaluation.detection is not None:
            tracker.log_metrics(0, evaluation.detection.to_metrics())
        missing = tracker.list_missing()
        succeeded = not missing
    finally:
        tracker.finish(succeeded)

    # Show the results.
    for line in account.to_lines():
        console.say(f"  {line}")
    for line in evaluation.list_tiles():
        console.say(f"  {line}")
    if evaluation.detection is not None:
        for line in evaluation.detection.to_lines():
            console.say(f"  {line}".rstrip())
    files = {"table": run.child(METRICS_FILE).uri, "report": run.child(REPORT_FILE).uri}
    if missing:
        raise JobFailed("\n".join([f"measured, but {missing[0]}", *files.values()]))
    console.footer("done", {**files, "took": format_duration(time.monotonic() - started)})
    return evaluation


def _describe_job(
    section: EvaluateSection, results: Mapping[str, ResultImages], place: str, run: Location
) -> dict[str, str]:
    """Return the facts of the job's header."""
    truth = f" against {section.clear}" if section.clear else ", without a truth"
    models = []
    for name, source in section.models.items():
        kind = "results in " if name in results else ""
        models.append(f"{name} ({kind}{source})")
    ensemble = {"restored": "by self-ensemble"} if section.self_ensemble else {}
    detector = {} if section.detector is None else {"detector": f"{section.detector}, boxes of {section.boxes}"}
    return {
        "images": section.hazy + truth,
        "models": ", ".join(models) or "none",
        "metrics": ", ".join(section.metrics),
        **ensemble,
        **detector,
        "on": place,
        "run": run.uri,
    }


def _give_account(reference: str | None, evaluation: Evaluation) -> Account:
    """Reduce the measurements to intervals, comparisons and text.

    `reference` is the model or baseline to compare the others with.
    """
    measurements = evaluation.measurements
    intervals = measurements.estimate_intervals()
    comparisons = {} if reference is None else measurements.compare_with(reference)

    # Name all skipped images, but only the first missing values: these may be thousands.
    missing = measurements.describe_left_out()
    missing += [f"skipped: {uri}: {reason}" for uri, reason in evaluation.bad_files.items()]
    for line in evaluation.unmeasured[:MAX_NAMED_UNMEASURED]:
        missing.append(f"no value: {line}")
    more = len(evaluation.unmeasured) - MAX_NAMED_UNMEASURED
    if more > 0:
        missing.append(f"no value: {more} more, empty in {METRICS_FILE}")

    return Account(
        intervals=intervals,
        comparisons=comparisons,
        means=format_intervals(intervals),
        means_note=f"means over {measurements.describe_images()}, with 95 % bootstrap intervals",
        differences=format_comparisons(comparisons),
        differences_note=f"difference from {reference}, image by image (p: sign-flip test)",
        missing=missing,
    )


def _make_files(job: EvaluateJob, run: Location, evaluation: Evaluation, account: Account) -> dict[str, bytes]:
    """Return the contents of the run's files by name."""
    measurements, reference = evaluation.measurements, job.evaluate.reference
    table = measurements.to_table()
    files = {
        JOB_FILE: dump_job(job).encode(),
        METRICS_FILE: encode_csv(table),
        "metrics.parquet": encode_parquet(table),
        "summary.csv": encode_csv(build_interval_table(account.intervals)),
        SHEET_FILE: evaluation.contact_sheet,
    }
    if reference is not None and account.comparisons:
        files["comparison.csv"] = encode_csv(build_comparison_table(account.comparisons, reference))

    detection_sections: list[PageSection] = []
    if evaluation.detection is not None:
        files |= evaluation.detection.to_files()
        detection_sections = evaluation.detection.to_sections()

    # The page omits sections without items.
    differences = [Table([""] * 6, account.differences)] if account.differences else []
    missing = [Listing("\n".join(account.missing))] if account.missing else []
    tiles = [Listing("\n".join(evaluation.list_tiles()))] if evaluation.tilings else []
    pictures = PictureItem([("contact sheet", evaluation.contact_sheet)], is_wide=True)
    sections = [
        PageSection("Result", account.means_note, [Table(account.means[0], account.means[1:])]),
        PageSection("Differences", account.differences_note, differences),
        *detection_sections,
        PageSection("Pictures", "Some of the images.", [pictures]),
        PageSection("Tiles", "Models whose pictures depend on the tiles that large images were cut into.", tiles),
        PageSection("Missing", "Images and values not in the tables.", missing),
        PageSection("Job", "The job file with every default filled in.", [Listing(dump_job(job))]),
    ]
    files[REPORT_FILE] = render(run.name, f"{len(measurements.models)} models and baselines measured.", sections)
    return files
