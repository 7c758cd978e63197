"""From a tune job to the jobs of its trials, and what would be wrong with any of them."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from corun_ray.config.jobs import ColabatorJob, Job, PretrainJob, TuneJob
from corun_ray.config.messages import explain_errors, explain_unknown_key
from corun_ray.config.reference import accepts_key, find_section, list_keys
from corun_ray.config.tasks import Choice, RangeSection
from corun_ray.config.yaml_reader import Loc

OWN = ("kind", "name", "storage", "tracking", "cluster", "tune")
"""Keys that are the search's own."""


def build_trial_job(job: TuneJob, values: Mapping[str, Any]) -> ColabatorJob:
    """The job of one trial: that of the search, with these values at their keys. Raises pydantic's ValidationError."""
    tree = job.model_dump(exclude={"tune"}) | {"kind": "colabator"}
    for path, value in values.items():
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[key] = value
    return ColabatorJob.model_validate(tree)


def build_pretraining_job(trial: ColabatorJob, steps: int) -> PretrainJob:
    """The pre-training that goes before a trial: the same data, haze and network, losses and rates of its own kind."""
    kept = trial.model_dump(include={"seed", "storage", "haze", "network", "cluster", "tracking"})
    train = trial.train.model_dump(exclude={"steps"}) | {"steps": steps}
    optim = trial.optim.model_dump(include={"ema", "precision", "compile"}) | {"schedule_steps": steps}
    own = {
        "kind": "pretrain",
        "name": f"{trial.name}-pretrained",
        "data": trial.data.model_dump(exclude={"hazy"}),
        "loss": trial.loss.model_dump(include={"perceptual", "weights"}),
        "optim": optim,
        "train": train,
    }
    return PretrainJob.model_validate(kept | own)


def list_corners(job: TuneJob) -> Iterator[dict[str, Any]]:
    """Values of trials at the ends of what may be chosen: every combination of the lists and the ranges' two ends."""
    search = job.tune.search
    for values in itertools.product(*(_ends(choice) for choice in search.values())):
        yield dict(zip(search, values, strict=True))


def choose_example_job(job: Job) -> Job:
    """A search's first trial, to look at in its place; any other job as it is."""
    return build_trial_job(job, next(list_corners(job))) if isinstance(job, TuneJob) else job


def find_search_mistakes(job: TuneJob) -> dict[Loc, str]:
    """What is wrong with the search: keys that no trial has, and the first thing wrong at each key of any trial."""
    known = list_keys(ColabatorJob)
    found: dict[Loc, str] = {}
    for path in job.tune.search:
        if path.partition(".")[0] in OWN:
            found["tune", "search", path] = "not to be searched: it belongs to the search itself"
        elif not accepts_key("colabator", path):
            found["tune", "search", path] = explain_unknown_key(
                path, "colabator", used_elsewhere=accepts_key("pretrain", path)
            )
        elif path in known and find_section(known[path]):
            found["tune", "search", path] = "a section, not a value"
    if job.tune.metric not in (measured := _measured(job)):
        gives = ", ".join(measured) or "nothing: there is no data.validation"
        found["tune", "metric"] = f"{job.tune.metric} is not measured (validation gives {gives})"
    if found:
        return found
    for values in list_corners(job):
        try:
            build_trial_job(job, values)
        except ValidationError as error:
            for loc, text in explain_errors(error.errors(include_url=False), "colabator", is_sure=True):
                searched = next((path for path in values if tuple(path.split(".")) == loc[: path.count(".") + 1]), None)
                found.setdefault(loc if searched is None else ("tune", "search", searched), text)
    return found


def _measured(job: TuneJob) -> list[str]:
    """The metrics that validation will have; see `service.validation`."""
    named = {f"val/{name}": section for name, section in job.data.validation_sets.items()}
    sections = named if job.data.validation is None else {"val": job.data.validation} | named
    return [
        f"{prefix}/{metric}"
        for prefix, section in sections.items()
        for metric in (("fade",) if section.clear is None else ("fade", "psnr", "ssim"))
    ]


def _ends(choice: Choice) -> tuple[Any, ...]:
    return (choice.low, choice.high) if isinstance(choice, RangeSection) else choice
