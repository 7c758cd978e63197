"""What is known of a trained model, for people (a card with pictures) and for programs (tags)."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from corun_ray import PACKAGE
from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.loading import dump_job
from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.pictures import grid, thumbnail
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.service.data.manifest import HeldOutSet, held_out_sets
from corun_ray.service.models.flavor import CARD_FILE
from corun_ray.service.models.registry import HELD_OUT_TAG, SUMMARY_TAG, ModelDescription
from corun_ray.service.report.statistics import estimate_interval
from corun_ray.service.runs.held_out import VALIDATION_FILE, ValidationLog, read_examples
from corun_ray.service.runs.record import JOB_FILE
from corun_ray.service.storage import Location

PICTURES_FILE = "pictures.jpg"
PICTURED, CELL_PX = 4, 360

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

`corun-ray dehaze PHOTOS OUT --model models:/NAME@champion` does a folder; `corun-ray pull` writes plain files;
`network.init: models:/NAME@champion` in a job file trains on from here.

## How it was trained

```yaml
{job}```

Data: `{data}` (digest of the list of images). Code: `{code}`.

## Limits

A restoration is an estimate: where haze has hidden a thing, what appears there is made up. Do not measure from it. The
numbers above hold for the images named in the job file, and for others only as far as they are alike.
"""


def describe_model(
    job: TrainingJob, spec: NetworkSpec, data: str, run: Location, log: ValidationLog
) -> ModelDescription:
    """The tags and files of a job's model: `data` is the digest of its manifest, `run` its folder."""
    last = log.last_step
    values = {} if last is None else log.at(last)
    means = {
        f"{prefix}/{metric}": estimate_interval(np.array([*images.values()]))
        for (prefix, metric), images in values.items()
    }
    tags = {
        "corun_ray.kind": job.kind,
        "corun_ray.job": dump_job(job),
        "corun_ray.data": data,
        "corun_ray.code": read_code_version(),
        "corun_ray.network": json.dumps({"type": spec.type, **spec.args}),
        "corun_ray.steps": str(job.train.steps),
        HELD_OUT_TAG: " ".join(f"{held.prefix}={_digest(held)}" for held in held_out_sets(job)),
        SUMMARY_TAG: _summary(job, spec),
        **{name: f"{interval.mean:.6g}" for name, interval in means.items()},
    }
    rows = [f"| {name} | {found.mean:.4f} | {found.span} | {found.count} |" for name, found in means.items()]
    head = ["| metric | mean | 95 % interval | images |", "| --- | --- | --- | --- |"]
    pictures = _pictures(run, last)
    card = CARD.format(
        title=_title(spec),
        summary=tags[SUMMARY_TAG],
        pictures=f"![hazy above, restored below]({PICTURES_FILE})\n" if pictures else "",
        measured="\n".join([*head, *rows]) if rows else "On nothing: the job names no `data.validation`.",
        job=tags["corun_ray.job"],
        data=data,
        code=tags["corun_ray.code"],
    )
    files = {CARD_FILE: card.encode(), JOB_FILE: tags["corun_ray.job"].encode(), VALIDATION_FILE: log.to_csv()}
    return ModelDescription(tags, files | ({PICTURES_FILE: pictures} if pictures else {}))


def read_code_version() -> str:
    """The package's version and a digest of its sources, which tells two checkouts of one version apart."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        number = version("corun-ray")
    except PackageNotFoundError:  # runs from an uploaded working directory, where nothing is installed
        number = "uninstalled"
    return f"{number} sources {digest.hexdigest()[:16]}"


def _digest(held: HeldOutSet) -> str:
    listing = json.dumps([held.hazy_root, held.clear_root, held.pairs])
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def _title(spec: NetworkSpec) -> str:
    if spec.type == "corun":
        return f"CORUN, {spec.args['stages']} stages, width {spec.args['width']}"
    return spec.type


def _summary(job: TrainingJob, spec: NetworkSpec) -> str:
    how = "by Colabator on real haze" if isinstance(job, ColabatorJob) else "on synthetic haze"
    if job.data.paired is not None:
        how = how.replace("synthetic haze", "pairs of degraded and clean images")
    start = f", from {job.network.init}" if job.network.init else ""
    return f"{_title(spec)}, trained {how} by the job {job.name} in {job.train.steps} steps{start}."


def _pictures(run: Location, step: int | None) -> bytes | None:
    """The first pictured images of the last validation, hazy above restored."""
    examples = [] if step is None else read_examples(run, step)[:PICTURED]
    if not examples:
        return None
    sides = ([example.hazy for example in examples], [example.output for example in examples])
    rows = [{str(number): decode_image(jpeg) for number, jpeg in enumerate(side, 1)} for side in sides]
    return thumbnail(grid(rows, CELL_PX, ["hazy", "restored"]), PICTURED * (CELL_PX + 40))
