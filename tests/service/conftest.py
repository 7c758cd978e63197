"""Training runs that several test files look at from their own sides."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.role_s3 import RoleS3
from tests.service.data.test_packs import packed
from tests.service.jobs import small_job
from tests.service.scraping import Scraper


class WatchedRun(NamedTuple):
    """A training to its end."""

    job: TrainingJob
    uri: str
    """Of its model."""
    scraper: Scraper
    """What Prometheus could have seen of it."""
    output: str
    """What it printed."""


@pytest.fixture(scope="session")
def bucket(s3_server, dataset) -> str:
    """The dataset in a bucket."""
    client = boto3.client("s3")
    client.create_bucket(Bucket="haze")
    for path in dataset.rglob("*.*"):
        client.upload_file(str(path), "haze", f"team/{path.relative_to(dataset)}")
    return "s3://haze/team"


@pytest.fixture(scope="session")
def team_role(s3_server, bucket) -> Iterator[RoleS3]:
    """A way to that bucket for a role that may read and write below `team/`, and nothing else."""
    with RoleS3(s3_server, "haze", "team") as role:
        yield role


@pytest.fixture(scope="session")
def watched_colabator(local_ray, bucket, team_role, mlflow_server, tmp_path_factory) -> WatchedRun:
    """A Colabator run of two workers to the end, from a bucket into the bucket by a role, tracked by a server."""
    folder = tmp_path_factory.mktemp("colabator")
    by_role = f"?endpoint_override={team_role.url}"
    job = small_job(
        "colabator",
        folder,
        folder,
        data={
            "clear": f"{bucket}/clear{by_role}",
            "depth": f"{bucket}/depth{by_role}",
            "hazy": f"{bucket}/hazy{by_role}",
            "validation": {"hazy": f"{bucket}/hazy{by_role}", "clear": f"{bucket}/hazy_truth{by_role}"},
        },
        train={"steps": 6, "log_every": 2, "checkpoint_every": 3, "validate_every": 3, "validation_images": 2},
        coherence={"share_blocks": True},
        cluster={"workers": 2},
        tracking={"uri": mlflow_server, "register": "watched"},
    )
    # The name tells its metrics and log lines from others'.
    job = job.model_copy(update={"name": "watched", "storage": f"{bucket}/runs{by_role}"})
    with Scraper() as scraper, contextlib.redirect_stdout(io.StringIO()) as output:
        uri = run_training(job, Console(), Path())
    return WatchedRun(job, uri, scraper, output.getvalue())


@pytest.fixture(scope="session")
def colabator(watched_colabator) -> tuple[TrainingJob, str]:
    """The job of that run, and the URI of its model."""
    return watched_colabator.job, watched_colabator.uri


class OwnClassRun(NamedTuple):
    """A Colabator run of a user's own network on packs, one image of which is damaged."""

    job: TrainingJob
    uri: str
    """Of its model."""
    folder: Path
    """The packs `clear` and `hazy`, and the runs."""


@pytest.fixture(scope="session")
def own_class(watched_colabator, dataset, tmp_path_factory) -> OwnClassRun:
    """The second version of the watched model. Its rate is so high that it is worse than the first."""
    folder = tmp_path_factory.mktemp("own_class")
    shutil.copytree(dataset / "clear", folder / "photographs")
    (folder / "photographs" / "view_3.png").write_text("no picture")
    packed(folder / "photographs", folder / "clear", dataset / "depth")
    packed(dataset / "hazy", folder / "hazy")

    first = watched_colabator.job
    assert first.data.validation is not None
    pack = str(folder / "clear")
    job = small_job(
        "colabator",
        folder,
        folder,
        data={
            "clear": pack,
            "depth": pack,
            "hazy": str(folder / "hazy"),
            "max_bad_fraction": 0.5,
            "validation": first.data.validation.model_dump(),
        },
        network={"type": "curve:Curve", "args": {"channels": 6}},
        optim={"lr": 0.05, "schedule_steps": 8},
        train={"steps": 8, "checkpoint_every": 4, "validate_every": 8, "validation_images": 2},
        tracking={"uri": first.tracking.uri, "register": first.tracking.register},
    )
    job = job.model_copy(update={"name": "own-class"})
    return OwnClassRun(job, run_training(job, Console(), Path(__file__).parent), folder)
