"""What goes to a cluster with a submitted job: its command, the code, the environment that its file names."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from corun_ray.config.jobs import DehazeJob, EvaluateJob, Job, ServeJob, TrainingJob
from corun_ray.config.loading import JobFileError, load_jobs
from corun_ray.service.cluster.connect import PACKAGE
from corun_ray.service.cluster.paths import list_folders

SQLITE = "sqlite:///"
ELSEWHERE = "a submitted job runs on the cluster: give a URI, or an absolute path that its nodes reach"
EXCLUDED_PATTERNS = ["/tests/", "/docs/"]
"""Of a checkout, what no job needs; Ray leaves out what .gitignore names."""


@dataclass(frozen=True)
class Submission:
    """All that Ray's Jobs API is told of a job file."""

    name: str
    entrypoint: str
    working_dir: Path
    py_modules: tuple[Path, ...]
    """Our package, where the working directory does not hold it."""
    env: Mapping[str, str]
    metadata: Mapping[str, str]


class _Asked(Mapping[str, str]):
    """An environment that remembers which of its variables were asked for."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.found: dict[str, str] = {}

    def __getitem__(self, name: str) -> str:
        self.found[name] = self._env[name]
        return self._env[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._env)

    def __len__(self) -> int:
        return len(self._env)


def prepare_submission(
    path: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    name: str | None = None,
    env: Mapping[str, str] = os.environ,
    more_env: Sequence[str] = (),
) -> Submission:
    """How a job file is submitted so that it means on the cluster what it means here.

    Variables that the file names go along with their values of `env`, and so do those of `more_env`, `NAME` or
    `NAME=VALUE`. The name is that of the file's one job, else of the file. Raises JobFileError: for whatever is wrong
    with the file, for variables that are not set, and for relative paths, which would mean another place there.
    """
    asked = _Asked(env)
    jobs = load_jobs(path, overrides, asked)
    relative = [
        f"{f'job {job.name}: ' if len(jobs) > 1 else ''}{key}: {place} is relative, and {ELSEWHERE}"
        for job in jobs
        for key, place in _relative_places(job)
    ]
    given, unset = _given(more_env, env)
    if wrong := [*relative, *(f"--env {one}: not set here (or NAME=VALUE)" for one in unset)]:
        raise JobFileError(wrong)
    file = path.absolute()
    checkout = PACKAGE.parent
    is_of_checkout = (checkout / "pyproject.toml").exists() and file.is_relative_to(checkout)
    working_dir = checkout if is_of_checkout else file.parent
    settings = [word for one in overrides for word in ("--set", one)]
    command = ["python3", "-m", "corun_ray", "run", str(file.relative_to(working_dir)), *settings]
    return Submission(
        name=name or (jobs[0].name if len(jobs) == 1 else file.stem.lower()),
        entrypoint=shlex.join([*command, *["--resume"] * resume]),
        working_dir=working_dir,
        py_modules=() if is_of_checkout else (PACKAGE,),
        env=asked.found | given,
        metadata={"jobs": ",".join(job.name for job in jobs), "kinds": ",".join(job.kind for job in jobs)},
    )


def _given(more_env: Sequence[str], env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The variables asked for, and the names among them that have no value."""
    given, unset = {}, []
    for text in more_env:
        name, mark, value = text.partition("=")
        if mark and name:
            given[name] = value
        elif name in env:
            given[name] = env[name]
        else:
            unset.append(text)
    return given, unset


def _relative_places(job: Job) -> Iterator[tuple[str, str]]:
    """Keys that name places by a relative path; a model may be one of MLflow's."""
    places = [*list_folders(job), *_models(job)]
    if job.tracking.uri.startswith(SQLITE):
        places.append(("tracking.uri", job.tracking.uri.removeprefix(SQLITE)))
    for key, place in places:
        if not place.startswith(("/", "~", "models:", "runs:")) and "://" not in place:
            yield key, place


def _models(job: Job) -> Iterator[tuple[str, str]]:
    if isinstance(job, TrainingJob) and job.network.init:
        yield "network.init", job.network.init
    elif isinstance(job, EvaluateJob):
        for name, source in job.evaluate.models.items():
            yield f"evaluate.models.{name}", source
    elif isinstance(job, DehazeJob):
        yield "dehaze.model", job.dehaze.model
    elif isinstance(job, ServeJob):
        yield "serve.model", job.serve.model
