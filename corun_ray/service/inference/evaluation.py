"""The job of kind `evaluate`, seen from the driver: measure, show, keep."""

import time

from corun_ray.config.jobs import EvaluateJob
from corun_ray.config.loading import dump_job
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.data.manifest import held_out
from corun_ray.service.inference.evaluate import Evaluation, evaluate
from corun_ray.service.inference.measurements import (
    aligned,
    as_csv,
    as_parquet,
    comparison_cells,
    comparison_table,
    summary_cells,
    summary_table,
)
from corun_ray.service.models.sources import fetch_model
from corun_ray.service.models.tracking import Tracker, tracking_uri
from corun_ray.service.report.page import REPORT_FILE, Listing, Pictures, Section, Table, render
from corun_ray.service.runs.record import JOB_FILE
from corun_ray.service.storage import Location, locate
from corun_ray.service.telemetry.console import Console, duration

NAMED_UNMEASURED = 10


def run_evaluation(job: EvaluateJob, console: Console) -> Evaluation:
    """Measures the job's models; leaves tables and a contact sheet.

    Raises the errors of `held_out` and `fetch_model` before anything is started, then those of `evaluate`.
    """
    started = time.monotonic()
    section = job.evaluate
    pairs = held_out(section.hazy, section.clear, "evaluate")
    models = {name: fetch_model(source, tracking_uri(job)) for name, source in section.models.items()}
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
            tracker.file(name, content)
        for model, intervals in found.measurements.intervals().items():
            tracker.metrics(0, {f"{model}/{metric}": interval.mean for metric, interval in intervals.items()})
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
        Section("Result", about_means, [Table(means[0], means[1:])]),
        Section("Differences", about_differences, [Table([""] * 6, differences)] if differences else []),
        Section("Pictures", "Some of the images.", [Pictures([("contact sheet", found.contact_sheet)], is_wide=True)]),
        Section("Missing", "Images and values not in the tables.", [Listing("\n".join(missing))] if missing else []),
        Section("Job", "The job file with every default filled in.", [Listing(dump_job(job))]),
    ]
    files[REPORT_FILE] = render(run.name, f"{len(measurements.models)} models and baselines measured.", sections)
    lines = [about_means, *aligned(means)]
    if differences:
        lines += ["", about_differences, *aligned(differences)]
    return files, lines + missing
