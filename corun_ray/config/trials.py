"""Build the jobs of a search's trials, and find the mistakes in them."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from corun_ray.config.jobs import ColabatorJob, Job, PretrainJob, TuneJob
from corun_ray.config.messages import explain_errors, explain_unknown_key
from corun_ray.config.reference import accepts_key, find_section, list_keys
from corun_ray.config.tasks import Choice, RangeSection
from corun_ray.config.yaml_reader import Loc

OWN_KEYS = ("kind", "name", "storage", "tracking", "cluster", "tune")
"""Keys that belong to the search itself and cannot vary."""


def build_trial_job(job: TuneJob, values: Mapping[str, Any]) -> ColabatorJob:
    """Build the job of one trial.

    The job is that of the search, with these values at their keys.

    Raises pydantic's `ValidationError`.
    """
    tree = job.model_dump(exclude={"tune"}) | {"kind": "colabator"}
    for path, value in values.items():
        # Walk down to the section of the key.
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[key] = value
    return ColabatorJob.model_validate(tree)


def build_pretraining_job(trial: ColabatorJob, steps: int) -> PretrainJob:
    """Build the pre-training before a trial.

    Data, haze and network are those of the trial, and so is the weight of the true transmission. The weights of the
    published losses and the learning rates are the defaults of pre-training.
    """
    # Sections that both kinds share, then sections from which pre-training takes some keys.
    kept = trial.model_dump(include={"seed", "storage", "haze", "network", "cluster", "tracking"})
    train = trial.train.model_dump(exclude={"steps", "best"}) | {"steps": steps}
    optim = trial.optim.model_dump(include={"ema", "precision", "compile", "clip_norm"}) | {"schedule_steps": steps}
    own = {
        "kind": "pretrain",
        "name": f"{trial.name}-pretrained",
        "data": trial.data.model_dump(exclude={"hazy"}),
        "loss": trial.loss.model_dump(include={"perceptual", "weights", "transmission"}),
        "optim": optim,
        "train": train,
    }
    return PretrainJob.model_validate(kept | own)


def list_corners(job: TuneJob) -> Iterator[dict[str, Any]]:
    """Yield every combination of listed values and ranges' ends."""
    search = job.tune.search
    for values in itertools.product(*map(_list_ends, search.values())):
        yield dict(zip(search, values, strict=True))


def choose_example_job(job: Job) -> Job:
    """Return a search's first trial, other jobs unchanged."""
    if not isinstance(job, TuneJob):
        return job
    return build_trial_job(job, next(list_corners(job)))


def list_example_trials(job: TuneJob, *sections: str, but: str | None = None) -> list[ColabatorJob]:
    """Return trials of a search that differ in these sections, one of each kind.

    `but` is a key of the only section, which may differ as well.
    """
    excluded = None if but is None else {sections[0]: {but}}
    found: dict[str, ColabatorJob] = {}
    for values in list_corners(job):
        trial = build_trial_job(job, values)
        found.setdefault(trial.model_dump_json(include=set(sections), exclude=excluded), trial)
    return list(found.values())


def list_data_examples(job: Job) -> list[Job]:
    """Return a search's trials that differ in their images, one of each kind; another job alone."""
    return [*list_example_trials(job, "data", but="patch_px")] if isinstance(job, TuneJob) else [job]


def find_search_mistakes(job: TuneJob) -> dict[Loc, str]:
    """Return place → explanation of the search's mistakes.

    Mistakes are keys that cannot vary, an unmeasured metric, and else the first mistake at each key of any trial.
    """
    # Keys that no trial has.
    known = list_keys(ColabatorJob)
    found: dict[Loc, str] = {}
    for path in job.tune.search:
        if path.partition(".")[0] in OWN_KEYS:
            found["tune", "search", path] = "not to be searched: it belongs to the search itself"
        elif not accepts_key("colabator", path):
            found["tune", "search", path] = explain_unknown_key(
                path, "colabator", used_elsewhere=accepts_key("pretrain", path)
            )
        elif path in known and find_section(known[path]):
            found["tune", "search", path] = "a section, not a value"

    # A metric that validation does not give.
    if job.tune.metric not in job.measured_metrics:
        gives = ", ".join(job.measured_metrics) or "nothing: there is no data.validation"
        found["tune", "metric"] = f"{job.tune.metric} is not measured (validation gives {gives})"
    if found:
        return found

    # Mistakes of any trial, at the searched key where there is one.
    for values in list_corners(job):
        try:
            build_trial_job(job, values)
        except ValidationError as error:
            for loc, text in explain_errors(error.errors(include_url=False), "colabator", is_sure=True):
                found.setdefault(_place_in_search(loc, values), text)
    return found


def _place_in_search(loc: Loc, searched: Iterable[str]) -> Loc:
    """Return the place within the search of a trial's key.

    Keys that do not vary keep their place.
    """
    for path in searched:
        parts = tuple(path.split("."))
        if loc[: len(parts)] == parts:
            return "tune", "search", path
    return loc


def _list_ends(choice: Choice) -> tuple[Any, ...]:
    return (choice.low, choice.high) if isinstance(choice, RangeSection) else choice
