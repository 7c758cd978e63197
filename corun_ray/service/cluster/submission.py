"""What goes to a cluster with a submitted job: its command, the code, and the environment that its file names."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from corun_ray import PACKAGE
from corun_ray.config.jobs import DehazeJob, EvaluateJob, Job, ServeJob, TrainingJob
from corun_ray.config.loading import JobFileError, load_jobs
from corun_ray.core.choices import SHIPPED_MODELS
from corun_ray.service.cluster.paths import list_folders

SQLITE = "sqlite:///"
ABSOLUTE_STARTS = ("/", "~", "models:", "runs:")
"""How a place begins that means the same on every machine, as does any URI."""
RELATIVE_ADVICE = "a submitted job runs on the cluster: give a URI, or an absolute path that its nodes reach"
EXCLUDED_PATTERNS = ["/tests/", "/docs/"]
"""Folders of a checkout that no job needs. Ray also excludes what .gitignore names."""


@dataclass(frozen=True)
class Submission:
    """All that Ray's Jobs API needs to know of a job file."""

    name: str
    entrypoint: str
    working_dir: Path
    py_modules: tuple[Path, ...]
    """Our package, where the working directory does not hold it."""
    env: Mapping[str, str]
    metadata: Mapping[str, str]


def prepare_submission(
    path: Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    name: str | None = None,
    env: Mapping[str, str] = os.environ,
    more_env: Sequence[str] = (),
) -> Submission:
    """Prepare a job file for a cluster.

    It must mean there what it means here.

    Variables that the file names go along with their values of `env`, and so do the variables of `more_env`, given as
    `NAME` or `NAME=VALUE`. The name is that of the file's only job, else that of the file.

    Raises `JobFileError` for any mistake in the file, for variables that are not set, and for relative paths, which
    would mean another place on the cluster.
    """
    # Reading the file tells which variables it names.
    recorded_env = _RecordingEnvironment(env)
    jobs = load_jobs(path, overrides, recorded_env)
    given_env, unset = _read_variables(more_env, env)

    # Report all mistakes at once.
    mistakes = _describe_relative_places(jobs)
    mistakes += [f"--env {variable}: not set here (or NAME=VALUE)" for variable in unset]
    if mistakes:
        raise JobFileError(mistakes)

    # A job file of this checkout goes with the whole checkout; any other goes with its folder and our package.
    file, checkout = path.absolute(), PACKAGE.parent
    is_in_checkout = (checkout / "pyproject.toml").exists() and file.is_relative_to(checkout)
    working_dir = checkout if is_in_checkout else file.parent

    # The same command as here.
    command = ["python3", "-m", "corun_ray", "run", str(file.relative_to(working_dir))]
    for override in overrides:
        command += ["--set", override]

    if resume:
        command.append("--resume")

    # The dashboard shows the name and the metadata.
    default_name = jobs[0].name if len(jobs) == 1 else file.stem.lower()
    return Submission(
        name=name or default_name,
        entrypoint=shlex.join(command),
        working_dir=working_dir,
        py_modules=() if is_in_checkout else (PACKAGE,),
        env=recorded_env.found | given_env,
        metadata={"jobs": ",".join(job.name for job in jobs), "kinds": ",".join(job.kind for job in jobs)},
    )


class _RecordingEnvironment(Mapping[str, str]):
    """An environment that remembers which of its variables were read."""

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


def _read_variables(texts: Sequence[str], env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Read variables given as `NAME` or `NAME=VALUE`.

    Also returns the texts that have no value.
    """
    found, unset = {}, []
    for text in texts:
        name, mark, value = text.partition("=")
        if mark and name:
            found[name] = value
        elif name in env:
            found[name] = env[name]
        else:
            unset.append(text)

    return found, unset


def _describe_relative_places(jobs: Sequence[Job]) -> list[str]:
    """Return a line for each relative path that a job names."""
    lines = []
    for job in jobs:
        # Of several jobs in a file, each is named.
        owner = f"job {job.name}: " if len(jobs) > 1 else ""
        for key, place in _find_relative_places(job):
            lines.append(f"{owner}{key}: {place} is relative, and {RELATIVE_ADVICE}")
    return lines


def _find_relative_places(job: Job) -> Iterator[tuple[str, str]]:
    """Yield the keys with relative paths, and the paths."""
    places = list_folders(job)

    # A shipped model is no place: the package brings it to the cluster.
    for key, model in _list_models(job):
        if model not in SHIPPED_MODELS:
            places.append((key, model))

    # An SQLite file of MLflow is a place, too.
    if job.tracking.uri.startswith(SQLITE):
        places.append(("tracking.uri", job.tracking.uri.removeprefix(SQLITE)))
    for key, place in places:
        if not place.startswith(ABSOLUTE_STARTS) and "://" not in place:
            yield key, place


def _list_models(job: Job) -> Iterator[tuple[str, str]]:
    """Yield the keys that name a model, and the model.

    A model is a file, one of MLflow's or a shipped one.
    """
    if isinstance(job, TrainingJob) and job.network.init:
        yield "network.init", job.network.init
    elif isinstance(job, EvaluateJob):
        for name, source in job.evaluate.models.items():
            yield f"evaluate.models.{name}", source
    elif isinstance(job, DehazeJob):
        yield "dehaze.model", job.dehaze.model
    elif isinstance(job, ServeJob):
        yield "serve.model", job.serve.model
