"""A training run that several test files look at from their own sides."""

from pathlib import Path
from typing import NamedTuple

import pytest

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.service.jobs import small_job
from tests.service.scraping import Scraper


class WatchedRun(NamedTuple):
    """A training to its end."""

    job: TrainingJob
    uri: str
    """Of its model."""
    scraper: Scraper
    """What Prometheus could have seen of it."""


@pytest.fixture(scope="session")
def watched_colabator(local_ray, dataset, tmp_path_factory) -> WatchedRun:
    """A Colabator run of two workers to the end."""
    job = small_job(
        "colabator",
        dataset,
        tmp_path_factory.mktemp("colabator"),
        data={"validation": {"hazy": str(dataset / "hazy"), "clear": str(dataset / "hazy_truth")}},
        train={"steps": 6, "log_every": 2, "checkpoint_every": 3, "validate_every": 3, "validation_images": 2},
        coherence={"share_blocks": True},
        cluster={"workers": 2},
        tracking={"register": "corun-test"},
    )
    job = job.model_copy(update={"name": "watched"})  # its metrics and log lines are told from others' by that
    with Scraper() as scraper:
        uri = run_training(job, Console(), Path())
    return WatchedRun(job, uri, scraper)


@pytest.fixture(scope="session")
def colabator(watched_colabator) -> tuple[TrainingJob, str]:
    """The job of that run, and the URI of its model."""
    return watched_colabator.job, watched_colabator.uri
