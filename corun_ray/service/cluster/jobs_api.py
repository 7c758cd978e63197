"""Ray's Jobs API as a person needs it: submit, follow, look, stop, by a job's name."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from corun_ray.config.messages import closest
from corun_ray.core.errors import UserError
from corun_ray.service.cluster.submission import EXCLUDED_PATTERNS, Submission

NAME_KEY = "corun_name"
POLL_S = 1.0
PATIENCE_S = 60.0
"""How long a cluster that no longer answers is asked again while a log is followed."""
CHATTY = (
    *("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"),
    *("ray._private.runtime_env.packaging", "ray._private.runtime_env.working_dir"),
)
"""Loggers of Ray's client that tell of every file that is not uploaded."""
RUNNING = (JobStatus.PENDING, JobStatus.RUNNING)


T = TypeVar("T")


class JobsError(UserError):
    """A cluster's Jobs API that does not answer or refuses; the message is one line."""


class JobsClient:
    """The submitted jobs of a cluster, its last first."""

    def __init__(self, address: str | None = None) -> None:
        """`address` is that of the dashboard, http://HOST:8265; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

        Raises `JobsError`.
        """
        if address:
            os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client lets its variables win over its argument
        self.address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        if not self.address:
            raise JobsError("no cluster: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._client = self._asked(JobSubmissionClient)

    def submit(self, submission: Submission) -> str:
        """Hands a job over, code included; returns its id. Raises `JobsError`, also where one of its name runs."""
        running = [job.submission_id for job in self.all() if has_name(job, submission.name) and job.status in RUNNING]
        if running:
            raise JobsError(f"{submission.name} is running already ({running[0]}): stop it, or give another --name")
        environment: dict[str, Any] = {
            "working_dir": str(submission.working_dir),
            "env_vars": dict(submission.env),
            "excludes": EXCLUDED_PATTERNS,
        }
        if submission.py_modules:  # Ray takes an empty list for a broken one
            environment["py_modules"] = [str(module) for module in submission.py_modules]
        return self._asked(
            lambda: self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=f"{submission.name}-{datetime.now():%Y%m%d-%H%M%S}",
                runtime_env=environment,
                metadata={**submission.metadata, NAME_KEY: submission.name},
            )
        )

    def all(self) -> list[JobDetails]:
        """Every job that was submitted, the last first. Raises `JobsError`."""
        jobs = [job for job in self._asked(self._client.list_jobs) if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def find(self, name: str) -> JobDetails:
        """The last job of that name, or the one of that id; raises `JobsError`, saying which there are."""
        jobs = self.all()
        for job in jobs:
            if name == job.submission_id or has_name(job, name):
                return job
        names = sorted({_name(job) for job in jobs})
        meant = closest(name, names)
        there = f"did you mean {meant}?" if meant else f"there are: {', '.join(names) or 'none'}"
        raise JobsError(f"no job is called {name} ({there})")

    def info(self, submission_id: str) -> JobDetails:
        """How a job stands. Raises `JobsError`."""
        return self._asked(lambda: self._client.get_job_info(submission_id))

    def log(self, submission_id: str) -> str:
        """All that a job has printed so far. Raises `JobsError`."""
        return self._asked(lambda: self._client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> None:
        """Asks a job to end; it has ended when `follow` returns. Raises `JobsError`."""
        self._asked(lambda: self._client.stop_job(submission_id))

    def follow(self, submission_id: str, copy: "LogCopy") -> JobDetails:
        """Copies what a job prints until it ends; returns how it ended.

        A connection that breaks is made again. Raises `JobsError` after a minute without an answer.
        """
        lost_at: float | None = None
        while True:
            with suppress(RuntimeError, OSError, aiohttp.ClientError):  # a broken connection: `info` tells more
                asyncio.run(self._tail(submission_id, copy))
            try:
                job = self.info(submission_id)
                if job.status.is_terminal():
                    copy.begin()
                    copy.add(self.log(submission_id))
                    return job
                lost_at = None
            except JobsError as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > PATIENCE_S:
                    raise JobsError(f"{error}; the job may go on: corun-ray jobs follow {submission_id}") from None
            time.sleep(POLL_S)

    async def _tail(self, submission_id: str, copy: "LogCopy") -> None:
        copy.begin()
        async for text in self._client.tail_job_logs(submission_id):
            copy.add(text)

    def _asked(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except AuthenticationError:
            have = "the token here is another" if _has_token() else "there is none here"
            raise JobsError(
                f"{self.address}: the cluster wants its token, and {have} (RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH "
                "or ~/.ray/auth_token with what `ray get-auth-token` prints on its head)"
            ) from None
        except (ConnectionError, requests.RequestException, OSError):
            raise JobsError(f"{self.address}: no Jobs API answers there (expected http://HOST:8265)") from None
        except (RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise JobsError(f"{self.address}: {lines[0][:300]}") from None


class LogCopy:
    """A log as it grows, each part of it written once, though it comes from its beginning at every connection."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._position = self._written = 0

    def begin(self) -> None:
        """The next text is the log's first."""
        self._position = 0

    def add(self, text: str) -> None:
        """The next part of the log."""
        if fresh := text[max(0, self._written - self._position) :]:
            self._write(fresh)
        self._position += len(text)
        self._written = max(self._written, self._position)


def has_name(job: JobDetails, name: str) -> bool:
    """Whether a job was submitted under this name."""
    return _name(job) == name


def _name(job: JobDetails) -> str:
    return (job.metadata or {}).get(NAME_KEY) or str(job.submission_id)


def _has_token() -> bool:
    """Whether Ray would find a token here."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).expanduser().exists()
