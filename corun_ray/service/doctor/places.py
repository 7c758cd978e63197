"""The doctor's trials of what lies outside Ray: an object store, an MLflow server, and their clocks."""

import email.utils
import os
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests

from corun_ray.service.models.tracking import TrackingError, asking_mlflow, connect_to_mlflow, get_or_create_experiment
from corun_ray.service.storage import PATIENCE_VARIABLE, Location, StorageError, locate

TRIAL_MIB = 16
MIB = 2**20
MB = 10**6
EXPERIMENT = "corun-doctor"
TRIAL_METRICS = {"trial": 1.0}
ANSWER_TIMEOUT_S = 10
LISTEN_TIMEOUT_S = 2


@dataclass(frozen=True)
class StorageSpeed:
    """How fast a trial wrote to storage and read from it."""

    write_mb_per_s: float
    read_mb_per_s: float
    keeps_versions: bool = False
    """Whether the store keeps what is deleted or replaced."""


def shorten_patience() -> None:
    """Let this process give up on servers within seconds.

    Otherwise it takes minutes.
    """
    os.environ.setdefault(PATIENCE_VARIABLE, str(ANSWER_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_TIMEOUT_S))


def try_storage(place: Location) -> StorageSpeed:
    """Write, read, list and delete a file below `place`.

    Raises `StorageError` for a step that does not work.
    """
    # A folder of its own: several nodes try the same place.
    folder = place.child(f".corun-doctor-{uuid.uuid4().hex[:12]}")
    content = os.urandom(TRIAL_MIB * MIB)
    try:
        # Write and read.
        started_s = time.monotonic()
        folder.child("trial.bin").write(content)
        written_s = time.monotonic()
        is_same = folder.child("trial.bin").read() == content
        read_s = time.monotonic()
        if not is_same:
            raise StorageError(f"cannot trust {place.uri}: it gives back other bytes than were written")

        # A store that keeps versions gives each of them an id.
        keeps_versions = False
        with suppress(OSError), place.filesystem.open_input_stream(folder.child("trial.bin").path) as file:
            keeps_versions = "VersionId" in (file.metadata() or {})

        # List.
        if folder.list_files() != ["trial.bin"]:
            raise StorageError(f"cannot list {place.uri}: a file that was written is not in it")
    finally:
        # Delete; the error of an earlier step says more than one of this step.
        with suppress(StorageError):
            folder.delete()

    if folder.child("trial.bin").exists():
        raise StorageError(f"cannot delete in {place.uri}: a file that was deleted is still there")

    num_mb = len(content) / MB
    return StorageSpeed(num_mb / (written_s - started_s), num_mb / (read_s - written_s), keeps_versions)


def try_mlflow(uri: str) -> str:
    """Log a run, read it back and delete it.

    The run has a metric and an artifact. Returns what was done.

    Raises `TrackingError` for a step that does not work.
    """
    mlflow = connect_to_mlflow(uri)
    content = uuid.uuid4().hex
    with asking_mlflow(uri, f"{uri} does not work as MLflow"):
        client = mlflow.MlflowClient(uri)
        run_id = client.create_run(get_or_create_experiment(mlflow, uri, EXPERIMENT)).info.run_id
        try:
            # Log.
            for name, value in TRIAL_METRICS.items():
                client.log_metric(run_id, name, value)

            client.log_text(run_id, content, "trial.txt")

            # Read back.
            with tempfile.TemporaryDirectory() as folder:
                artifact = Path(client.download_artifacts(run_id, "trial.txt", folder)).read_text()

            is_same = artifact == content and client.get_run(run_id).data.metrics == TRIAL_METRICS
        finally:
            client.delete_run(run_id)

    if not is_same:
        raise TrackingError(f"{uri} gives back other values than were logged")

    return "run, metric and artifact, written and read"


def is_listening(address: str) -> bool:
    """Return whether a server accepts connections at HOST:PORT."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    with suppress(OSError, ValueError), socket.create_connection((host, int(port)), LISTEN_TIMEOUT_S):
        return True
    return False


def measure_server_clocks(storage: str, tracking: str) -> dict[str, float]:
    """Measure how far the servers' clocks are ahead, in seconds.

    The servers are the object store and MLflow.

    A server that does not answer, or whose answer has no date, is missing in the result.
    """
    servers = {"MLflow": tracking}
    if storage.startswith("s3://"):
        # The trial of the storage has told why a store cannot be opened.
        with suppress(StorageError):
            servers["the object store"] = locate(storage).filesystem.handler.endpoint_url

    offsets = {}
    for name, url in servers.items():
        # MLflow in a file has no clock of its own.
        if url.startswith("http"):
            with suppress(requests.RequestException, ValueError):
                offsets[name] = _measure_http_clock(url)

    return offsets


def _measure_http_clock(url: str) -> float:
    """Measure how far a server's clock is ahead, in seconds.

    The date of its answer tells the time.

    Raises `requests.RequestException`, or `ValueError` where no date can be read.
    """
    asked_s = time.time()
    answer = requests.head(url, timeout=ANSWER_TIMEOUT_S)
    server_s = email.utils.parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
    answered_s = time.time()

    # The date is cut to the second, half a second on average, and was written halfway between question and answer.
    return server_s + 0.5 - (asked_s + answered_s) / 2
