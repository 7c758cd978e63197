"""The job of kind `evaluate`, seen from the driver: measure, show, keep."""

import time

from corun_ray.config import EvaluateJob
from corun_ray.jobfile import dump_job
from corun_ray.service import cluster
from corun_ray.service.console import Console, duration
from corun_ray.service.evaluate import Evaluation, evaluate
from corun_ray.service.evaluation_report import (
    as_csv,
    as_parquet,
    comparison_lines,
    comparison_table,
    summary_lines,
    summary_table,
)
from corun_ray.service.models import fetch_model
from corun_ray.service.runs import JOB_FILE
from corun_ray.service.storage import locate
from corun_ray.service.tracking import Tracker, tracking_uri

NAMED_UNMEASURED = 10


def run_evaluation(job: EvaluateJob, console: Console) -> Evaluation:
    """Measures the job's models; leaves tables and a contact sheet. Raises the errors of `evaluate`."""
    started = time.monotonic()
    section = job.evaluate
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
        found = evaluate(section, models, lambda done, total: console.progress(done, total, "image"))
        files, lines = _account(job, found)
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
    results = {"table": run.child("metrics.csv").uri, "pictures": run.child("contact_sheet.png").uri}
    console.footer("done", {**results, "took": duration(time.monotonic() - started)})
    return found


def _account(job: EvaluateJob, found: Evaluation) -> tuple[dict[str, bytes], list[str]]:
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
    lines = [
        f"means over {len(measurements.images)} images, with 95 % bootstrap intervals",
        *summary_lines(intervals),
    ]
    if reference is not None and len(measurements.models) > 1:
        comparisons = measurements.comparisons(reference)
        files["comparison.csv"] = as_csv(comparison_table(comparisons, reference))
        lines += ["", f"less {reference}, image by image (p: sign-flip test)", *comparison_lines(comparisons)]
    lines += [f"left out: {uri}: {reason}" for uri, reason in found.bad_files.items()]
    lines += [f"no value: {line}" for line in found.unmeasured[:NAMED_UNMEASURED]]
    if more := len(found.unmeasured[NAMED_UNMEASURED:]):
        lines.append(f"no value: {more} more, empty in metrics.csv")
    return files, lines
