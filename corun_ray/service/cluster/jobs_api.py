"""Submitted jobs by their names, through Ray's Jobs API: submit, follow, look at and stop them."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from corun_ray.config.messages import find_closest
from corun_ray.core.errors import UserError
from corun_ray.service.cluster.ports import JOBS_EXPECTED, PortError, ask_for_jobs_api, find_jobs_address
from corun_ray.service.cluster.submission import EXCLUDED_PATTERNS, Submission
from corun_ray.service.cluster.tokens import describe_token_trouble, send_token
from corun_ray.service.errors import format_reason
from corun_ray.service.proxies import describe_proxy, reach_loopback_directly
from corun_ray.service.waiting import announce_wait

NAME_KEY = "corun_name"
"""Key of a job's metadata that holds its name."""
POLL_S = 1.0
PATIENCE_S = 60.0
"""How long `follow` asks a cluster that no longer answers."""
ANSWER_TIMEOUT_S = 60.0
"""How long the API may take to answer a request."""
NO_AGENT = "No available agent"
"""What a dashboard says whose cluster has started a few seconds ago."""
STARTING_S = 30.0
"""How long `submit` waits for such a cluster."""
CHATTY_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
"""Loggers of Ray's client that report every file that is not uploaded."""
RUNNING = (JobStatus.PENDING, JobStatus.RUNNING)

Answer = TypeVar("Answer")


class JobsError(UserError):
    """A Jobs API that does not answer or refuses; the message is one line."""


class JobsClient:
    """The submitted jobs of a cluster."""

    def __init__(self, address: str | None = None) -> None:
        """Connect to the dashboard at `address`, http://HOST:8265.

        Without an address, RAY_API_SERVER_ADDRESS or RAY_ADDRESS gives it. Raises `JobsError`.
        """
        # Ray's client prefers its variables to its argument.
        if address:
            os.environ["RAY_API_SERVER_ADDRESS"] = address

        self.address = find_jobs_address(address)
        if not self.address:
            raise JobsError("no cluster: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")

        # Ray's client waits for minutes where nobody answers, and does not say what else does.
        send_token()
        reach_loopback_directly()
        try:
            ask_for_jobs_api(self.address)
        except PortError as error:
            raise JobsError(str(error)) from None

        for name in CHATTY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)

        self._client = self._call_api(_PatientClient)

    def submit(self, submission: Submission) -> str:
        """Submit a job, code included, and return its id.

        Raises `JobsError`, also where a job of that name is running.
        """
        # A name stands for one running job.
        for job in self.list_jobs():
            if has_name(job, submission.name) and job.status in RUNNING:
                raise JobsError(
                    f"{submission.name} is running already ({job.submission_id}): stop it, or give another --name"
                )

        environment: dict[str, Any] = {
            "working_dir": str(submission.working_dir),
            "env_vars": dict(submission.env),
            "excludes": EXCLUDED_PATTERNS,
        }

        # Ray refuses an empty list of modules.
        if submission.py_modules:
            environment["py_modules"] = [str(module) for module in submission.py_modules]

        # The time in the id keeps ids apart; the name in the metadata is what people ask for.
        return self._call_once_ready(
            lambda: self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=f"{submission.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}Z",
                runtime_env=environment,
                metadata={**submission.metadata, NAME_KEY: submission.name},
            )
        )

    def _call_once_ready(self, call: Callable[[], Answer]) -> Answer:
        """Call the API, again for a while if the cluster has only just started.

        Raises `JobsError`.
        """
        deadline_s = time.monotonic() + STARTING_S
        with ExitStack() as waiting:
            is_waiting = False
            while True:
                try:
                    return self._call_api(call)
                except JobsError as error:
                    if NO_AGENT not in str(error) or time.monotonic() > deadline_s:
                        raise

                if not is_waiting:
                    waiting.enter_context(announce_wait(f"{self.address} to be ready for jobs"))
                    is_waiting = True
                time.sleep(POLL_S)

    def list_jobs(self) -> list[JobDetails]:
        """List every submitted job, the last one first.

        Raises `JobsError`.
        """
        # Drivers that were not submitted have no id.
        jobs = [job for job in self._call_api(self._client.list_jobs) if job.submission_id]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def find(self, name: str) -> JobDetails:
        """Find the last job of a name, or of an id.

        Raises `JobsError`, naming the jobs that there are.
        """
        jobs = self.list_jobs()
        for job in jobs:
            if name == job.submission_id or has_name(job, name):
                return job

        # Suggest a similar name, or list all of them.
        names = sorted({_get_name(job) for job in jobs})
        similar = find_closest(name, names)
        if similar:
            raise JobsError(f"no job is called {name} (did you mean {similar}?)")

        raise JobsError(f"no job is called {name} (there are: {', '.join(names) or 'none'})")

    def read_status(self, submission_id: str) -> JobDetails:
        """Read how a job stands; raises `JobsError`."""
        return self._call_api(lambda: self._client.get_job_info(submission_id))

    def read_log(self, submission_id: str) -> str:
        """Read all that a job has printed so far.

        Raises `JobsError`.
        """
        return self._call_api(lambda: self._client.get_job_logs(submission_id))

    def stop(self, submission_id: str) -> None:
        """Ask a job to end.

        The job has ended when `follow` returns. Raises `JobsError`.
        """
        self._call_api(lambda: self._client.stop_job(submission_id))

    def follow(self, submission_id: str, copy: "LogCopy") -> JobDetails:
        """Copy a job's log until it ends; return its status.

        A connection that breaks is made again. Raises `JobsError` after a minute without an answer.
        """
        lost_since_s: float | None = None
        with ExitStack() as outage:
            while True:
                # Copy until the connection ends or breaks; the status tells why it did.
                with suppress(RuntimeError, OSError, aiohttp.ClientError):
                    asyncio.run(self._tail(submission_id, copy))

                # Ask how the job stands; an answer also ends an outage.
                asked_s = time.monotonic()
                try:
                    job = self.read_status(submission_id)
                    if job.status.is_terminal():
                        # The connection may have missed the end of the log.
                        copy.begin()
                        copy.add(self.read_log(submission_id))
                        return job

                    outage.close()
                    lost_since_s = None
                except JobsError as error:
                    if lost_since_s is None:
                        outage.enter_context(announce_wait(f"{self.address} to answer again"))
                        lost_since_s = asked_s
                    if time.monotonic() - lost_since_s > PATIENCE_S:
                        advice = f"the job may still run: corun-ray jobs follow {submission_id}"
                        raise JobsError(f"{error}; {advice}") from None

                time.sleep(POLL_S)

    async def _tail(self, submission_id: str, copy: "LogCopy") -> None:
        """Copy a job's log from its beginning, as it grows."""
        copy.begin()
        async for text in self._client.tail_job_logs(submission_id):
            copy.add(text)

    def _call_api(self, call: Callable[[], Answer]) -> Answer:
        """Call Ray's client and return its answer.

        Raises `JobsError` in place of the client's errors.
        """
        try:
            with announce_wait(f"the Jobs API of {self.address}"):
                return call()
        except AuthenticationError:
            raise JobsError(f"{self.address}: {describe_token_trouble()}") from None
        except (ConnectionError, requests.RequestException, OSError) as error:
            hint = f"{find_first_reason(error)}; {JOBS_EXPECTED}{describe_proxy(str(self.address))}"
            raise JobsError(f"{self.address}: no Jobs API answers there ({hint})") from None
        except (RuntimeError, ValueError) as error:
            raise JobsError(f"{self.address}: {format_reason(error, str(self.address))}") from None


class _PatientClient(JobSubmissionClient):
    """Ray's client with a limit for each answer; without one, it waits for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        """Make a request as Ray does."""
        return super()._do_request(method, endpoint, timeout=ANSWER_TIMEOUT_S, **options)


class LogCopy:
    """Copy of a log that grows: each part is written once, though every connection starts from its beginning."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._position = 0
        self._num_written = 0

    def begin(self) -> None:
        """Take the next text as the log's first."""
        self._position = 0

    def add(self, text: str) -> None:
        """Write the new text of the log's next part."""
        # Skip what an earlier connection has brought already.
        fresh = text[max(0, self._num_written - self._position) :]
        if fresh:
            self._write(fresh)
        self._position += len(text)
        self._num_written = max(self._num_written, self._position)


def find_first_reason(error: BaseException) -> str:
    """Return the reason of the first of a chain of errors, of which each was raised while the one before was handled.

    Ray's client tells no more than that it has failed to connect.
    """
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return format_reason(error)


def has_name(job: JobDetails, name: str) -> bool:
    """Return whether a job was submitted under this name."""
    return _get_name(job) == name


def _get_name(job: JobDetails) -> str:
    """Return a job's name, or its id.

    A job that was submitted without this project has no name.
    """
    return (job.metadata or {}).get(NAME_KEY) or str(job.submission_id)
