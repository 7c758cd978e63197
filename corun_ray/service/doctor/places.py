"""The doctor's trials of what lies outside Ray: an object store, an MLflow server, their clocks."""

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

from corun_ray.service.errors import get_first_line
from corun_ray.service.models.tracking import TrackingError, connect_to_mlflow, get_or_create_experiment
from corun_ray.service.storage import PATIENCE_VARIABLE, Location, StorageError

TRIAL_MIB = 16
MB = 10**6
EXPERIMENT = "corun-doctor"
ANSWER_S = 10


@dataclass(frozen=True)
class StorageSpeed:
    """Of a trial of storage."""

    write_mb_per_s: float
    read_mb_per_s: float


def shorten_patience() -> None:
    """Lets this process give up on a store or server within seconds, not minutes."""
    os.environ.setdefault(PATIENCE_VARIABLE, str(ANSWER_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_S))


def try_storage(place: Location) -> StorageSpeed:
    """Writes, reads, lists and deletes a file below `place`; raises `StorageError` for what does not work."""
    folder = place.child(f".corun-doctor-{uuid.uuid4().hex[:12]}")
    content = os.urandom(TRIAL_MIB * 2**20)
    try:
        started = time.monotonic()
        folder.child("trial.bin").write(content)
        written = time.monotonic()
        same = folder.child("trial.bin").read() == content
        read = time.monotonic()
        if not same:
            raise StorageError(f"cannot trust {place.uri}: it gives back other bytes than were written")
        if folder.list_files() != ["trial.bin"]:
            raise StorageError(f"cannot list {place.uri}: a file that was written is not in it")
    finally:
        with suppress(StorageError):  # the error that is under way says more
            folder.delete()
    if folder.child("trial.bin").exists():
        raise StorageError(f"cannot delete in {place.uri}: a file that was deleted is still there")
    return StorageSpeed(len(content) / MB / (written - started), len(content) / MB / (read - written))


def try_mlflow(uri: str) -> str:
    """Logs a run with a metric and an artifact, reads both back and deletes it; raises `TrackingError`."""
    mlflow = connect_to_mlflow(uri)
    content = uuid.uuid4().hex
    try:
        client = mlflow.MlflowClient(uri)
        run = client.create_run(get_or_create_experiment(mlflow, uri, EXPERIMENT)).info.run_id
        try:
            client.log_metric(run, "trial", 1.0)
            client.log_text(run, content, "trial.txt")
            with tempfile.TemporaryDirectory() as folder:
                same = Path(client.download_artifacts(run, "trial.txt", folder)).read_text() == content
            same = same and client.get_run(run).data.metrics == {"trial": 1.0}
        finally:
            client.delete_run(run)
    except Exception as error:
        raise TrackingError(f"{uri} does not work as MLflow: {get_first_line(error)}") from None
    if not same:
        raise TrackingError(f"{uri} gives back other values than were logged")
    return "run, metric and artifact, written and read"


def is_listening(address: str) -> bool:
    """Whether anything takes connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with suppress(OSError, ValueError), socket.create_connection((host, int(port)), ANSWER_S):
        return True
    return False


def measure_server_clocks(storage: str, tracking: str) -> dict[str, float]:
    """Seconds by which the clocks of the object store and of MLflow are ahead of ours, as far as they tell."""
    servers = {"MLflow": tracking}
    if storage.startswith("s3://"):
        servers["the object store"] = os.environ.get("AWS_ENDPOINT_URL") or "https://s3.amazonaws.com"
    offsets = {}
    for name, url in servers.items():
        if url.startswith("http"):
            with suppress(requests.RequestException, TypeError, ValueError):
                asked = time.time()
                answer = requests.head(url, timeout=ANSWER_S)
                told = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
                offsets[name] = told + 0.5 - (asked + time.time()) / 2  # a date is cut to the second
    return offsets
