"""The description of a trained model: a card with pictures for people, tags for programs."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from corun_ray import PACKAGE
from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.loading import dump_job
from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.pictures import draw_grid, encode_thumbnail
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.service.data.manifest import ValidationSet, list_validation_sets
from corun_ray.service.models.flavor import CARD_FILE
from corun_ray.service.models.registry import SUMMARY_TAG, VALIDATION_SETS_TAG, ModelDescription
from corun_ray.service.report.statistics import Interval, estimate_interval
from corun_ray.service.runs.held_out import VALIDATION_FILE, ValidationLog, read_examples
from corun_ray.service.runs.record import JOB_FILE
from corun_ray.service.storage import Location

PICTURES_FILE = "pictures.jpg"
MAX_PICTURED = 4
"""Images in the card's picture."""
CELL_PX = 360
CELL_MARGIN_PX = 40
DIGEST_CHARACTERS = 16

CARD = """\
# {title}

{summary}

{pictures}
## Measured

{measured}

## Use

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/NAME@champion")
clear = model.predict(images)  # uint8, B H W 3 (RGB), any size from 16 px

network = mlflow.pytorch.load_model("models:/NAME@champion")
clear = network(hazy)  # float, B 3 H W in [0, 1], any size from 16 px
```

`corun-ray dehaze PHOTOS OUT --model models:/NAME@champion` restores a folder; `corun-ray pull` writes plain files;
`network.init: models:/NAME@champion` in a job file starts a training from this model.

## How it was trained

```yaml
{job}```

Data: `{data}` (digest of the list of images). Code: `{code}`.

## Limits

A restoration is an estimate: where haze has hidden a thing, what appears there is made up. Do not measure from it. The
numbers above hold for the images named in the job file, and for other images only as far as these are alike.
"""


def describe_model(
    job: TrainingJob,
    spec: NetworkSpec,
    data_digest: str,
    run: Location,
    log: ValidationLog,
    best_step: int | None = None,
) -> ModelDescription:
    """Return the tags and files of a job's model.

    `data_digest` is that of the job's manifest, `run` the run's folder, `log` the run's validation values up to the
    model's step. `best_step` is the step of a model that is the best and not the last.
    """
    intervals = _estimate_intervals(log)

    # The tags are for programs: what the model is, where it comes from, how good it is.
    job_text = dump_job(job)
    set_digests = [f"{images.prefix}={_digest_images(images)}" for images in list_validation_sets(job)]
    tags = {
        "corun_ray.kind": job.kind,
        "corun_ray.job": job_text,
        "corun_ray.data": data_digest,
        "corun_ray.code": read_code_version(),
        "corun_ray.network": json.dumps({"type": spec.type, **spec.args}),
        "corun_ray.steps": str(best_step or job.train.steps),
        VALIDATION_SETS_TAG: " ".join(set_digests),
        SUMMARY_TAG: _summarise(job, spec, best_step),
    }
    for name, interval in intervals.items():
        tags[name] = f"{interval.mean:.6g}"

    # The picture is left out where the run has no validation images.
    pictures = _draw_pictures(run, log.last_step)
    card = CARD.format(
        title=_make_title(spec),
        summary=tags[SUMMARY_TAG],
        pictures=f"![hazy above, restored below]({PICTURES_FILE})\n" if pictures else "",
        measured=_tabulate(intervals) if intervals else "On nothing: the job names no `data.validation`.",
        job=job_text,
        data=data_digest,
        code=tags["corun_ray.code"],
    )
    files = {CARD_FILE: card.encode(), JOB_FILE: job_text.encode(), VALIDATION_FILE: log.to_csv()}
    if pictures:
        files[PICTURES_FILE] = pictures
    return ModelDescription(tags, files)


def read_code_version() -> str:
    """Return the package's version and a digest of its sources.

    The digest distinguishes two checkouts of one version.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")

    # A job that runs from an uploaded working directory has no installed package.
    try:
        number = version("corun-ray")
    except PackageNotFoundError:
        number = "uninstalled"
    return f"{number} sources {digest.hexdigest()[:DIGEST_CHARACTERS]}"


def _estimate_intervals(log: ValidationLog) -> dict[str, Interval]:
    """Reduce the last validation to mean and interval of each metric.

    The keys are such as `val/psnr`.
    """
    last_values = {} if log.last_step is None else log.at(log.last_step)
    intervals = {}
    for (prefix, metric), values_of_images in last_values.items():
        intervals[f"{prefix}/{metric}"] = estimate_interval(np.array(list(values_of_images.values())))
    return intervals


def _digest_images(images: ValidationSet) -> str:
    """Return a digest of a validation set's file names."""
    listing = json.dumps([images.hazy_root, images.clear_root, images.pairs])
    return hashlib.sha256(listing.encode()).hexdigest()[:DIGEST_CHARACTERS]


def _make_title(spec: NetworkSpec) -> str:
    """Name the network for a heading."""
    if spec.type == "corun":
        return f"CORUN, {spec.args['stages']} stages, width {spec.args['width']}"
    return spec.type


def _summarise(job: TrainingJob, spec: NetworkSpec, best_step: int | None) -> str:
    """Tell in one sentence how the model was trained."""
    synthetic = "on synthetic haze" if job.data.paired is None else "on pairs of degraded and clean images"
    method = "by Colabator on real haze" if isinstance(job, ColabatorJob) else synthetic
    start = f", from {job.network.init}" if job.network.init else ""
    steps = f"{job.train.steps} steps"
    if best_step is not None:
        steps = f"{best_step} of {steps}, the best by {job.train.best}"
    return f"{_make_title(spec)}, trained {method} by the job {job.name} in {steps}{start}."


def _tabulate(intervals: Mapping[str, Interval]) -> str:
    """Return the validation's means as a Markdown table."""
    # A metric without an interval has an empty cell.
    lines = ["| metric | mean | 95 % interval | images |", "| --- | --- | --- | --- |"]
    for name, interval in intervals.items():
        lines.append(f"| {name} | {interval.mean:.4f} | {interval.span} | {interval.count} |")
    return "\n".join(lines)


def _draw_pictures(run: Location, step: int | None) -> bytes | None:
    """Draw the first validation images, hazy above restored.

    Returns a JPEG of the validation after `step`.
    Returns None without a step or without images. Raises `StorageError`.
    """
    examples = [] if step is None else read_examples(run, step)[:MAX_PICTURED]
    if not examples:
        return None

    # One column for each image; its heading is its number.
    hazy, restored = {}, {}
    for number, example in enumerate(examples, 1):
        hazy[str(number)] = decode_image(example.hazy)
        restored[str(number)] = decode_image(example.output)
    picture = draw_grid([hazy, restored], CELL_PX, ["hazy", "restored"])
    return encode_thumbnail(picture, MAX_PICTURED * (CELL_PX + CELL_MARGIN_PX))
