"""A served model as an application of Ray Serve: made of a door and replicas, started, watched and ended.

Serving a model on Ray Serve, seen from the driver: it deploys, tells what happens, and ends all at its own end."""

import contextlib
import io
import os
import posixpath
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from corun_ray.config.jobs import ServeJob
from corun_ray.config.tasks import ServeSection
from corun_ray.core.inference.restore import MIN_SIDE_PX
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.cluster.connect import ClusterError
from corun_ray.service.errors import JobFailed, find_root_cause, get_first_line
from corun_ray.service.models.registry import Registry
from corun_ray.service.models.sources import MLFLOW_SCHEMES, Model, fetch_model
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.serve.app import HttpApp
from corun_ray.service.serve.messages import ServedModel
from corun_ray.service.serve.replica import Replica
from corun_ray.service.serve.uploads import UploadLimits
from corun_ray.service.telemetry.console import Console

LOOK_EVERY_S = 2.0
GRACE_S = 10.0
"""What requests in work get when the application ends."""
ENDING: dict[str, Any] = {"graceful_shutdown_timeout_s": GRACE_S, "graceful_shutdown_wait_loop_s": 0.5}
PINGS = 16
"""Looks at a replica's health, beside the requests that it may have."""
EVERY_ADDRESS = ("0.0.0.0", "::")


def build_application(section: ServeSection, model: Model, served: ServedModel, owner: str) -> serve.Application:
    """The door and its replicas, to be run by Ray Serve; the door knows its `owner`."""
    low, high = section.replicas
    max_in_flight = section.max_queued + high * section.max_batch
    amount: dict[str, Any] = {"num_replicas": low}
    if low < high:
        scaling = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": section.max_batch}
        amount = {"autoscaling_config": scaling}
    limits = UploadLimits(section.max_upload_mib, section.max_megapixels, MIN_SIDE_PX)
    restorer = serve.deployment(
        name="restorer",
        max_ongoing_requests=max_in_flight + PINGS,
        **ENDING,
        **amount,
        ray_actor_options={
            "num_cpus": section.cpus_per_replica,
            "num_gpus": section.gpus_per_replica,
            "runtime_env": {"env_vars": _environment(section, limits)},
        },
    )(Replica)
    door = serve.deployment(
        name="door",
        max_ongoing_requests=10 * max_in_flight,
        max_queued_requests=max_in_flight,
        **ENDING,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(HttpApp))
    handle = restorer.bind(
        {"model": ray.put(model)},
        max(1, int(section.cpus_per_replica)),
        section.memory_mib,
        section.gpus_per_replica,
        section.max_batch,
        section.batch_wait_s,
    )
    return door.bind(handle, served, limits, max_in_flight, section.timeout_s, owner)


def _environment(section: ServeSection, limits: UploadLimits) -> dict[str, str]:
    # OpenCV holds to the limit of pixels as well, should a file deceive the reader of headers.
    environment = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(limits.max_pixels)}
    return environment if section.gpus_per_replica else environment | {"CUDA_VISIBLE_DEVICES": ""}


class Deployment:
    """An application on the cluster's Ray Serve, which is started if there is none, and ended with the last one."""

    def __init__(self, job: ServeJob, model: Model, served: ServedModel) -> None:
        self._name, self._section = job.name, job.serve
        self._model, self._served = model, served
        self._owner = uuid.uuid4().hex
        self._starts_serve = not serve.status().proxies
        self.is_ours = False
        """Whether it is deployed, and nobody has replaced or deleted it as far as is known."""
        self.url = ""

    def __enter__(self) -> "Deployment":
        return self

    def start(self) -> None:
        """Returns when it answers; raises `JobFailed`."""
        section = self._section
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": section.host, "port": section.port})
            self.is_ours = True
            app = build_application(section, self._model, self._served, self._owner)
            serve.run(app, name=self._name, route_prefix=section.path)
        except (RayServeException, RayError, RuntimeError, TimeoutError, ValueError) as error:
            raise JobFailed(f"{self._name}: Ray Serve could not start it: {find_root_cause(str(error))}") from None
        # A Serve that ran before has an address of its own, which cannot be changed under its applications.
        client = _get_global_client()
        assert client is not None
        http = client.http_config
        host = socket.gethostname() if http.host in EVERY_ADDRESS else http.host
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{http.port}{section.path}"

    def news(self) -> Iterator[str]:
        """A line whenever something changes, as long as the application is this one's; raises `JobFailed`."""
        status = ApplicationStatus.RUNNING
        while self.is_ours:
            time.sleep(LOOK_EVERY_S)
            try:
                now = serve.status().applications.get(self._name)
            except (RayServeException, RayError) as error:
                raise JobFailed(f"{self._name}: Ray Serve is lost: {get_first_line(error)}") from None
            if now is None:
                self.is_ours = False
                yield "it was deleted by someone else"
            elif self._is_replaced():
                self.is_ours = False
                yield f"another deployment has taken the name {self._name}"
            elif now.status != status:
                status = now.status
                yield " ".join([status.value.lower().replace("_", " "), *now.message.splitlines()[:1]])

    def _is_replaced(self) -> bool:
        try:
            owner = serve.get_app_handle(self._name).owned_by.remote().result(timeout_s=LOOK_EVERY_S)
        except (RayServeException, RayError, TimeoutError):
            return False  # nobody answers: its state is told by Serve
        return bool(owner != self._owner)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not ray.is_initialized():
            return
        with contextlib.suppress(RayServeException, RayError):  # what is lost needs no end
            self.is_ours = self.is_ours and not self._is_replaced()
            left = serve.status().applications.keys() - ({self._name} if self.is_ours else set())
            if self._starts_serve and not left:
                # Serve's controller ends itself in the middle of a task, of which Ray informs the driver at length.
                with contextlib.redirect_stdout(io.StringIO()):
                    serve.shutdown()
            elif self.is_ours:
                serve.delete(self._name)


def run_serving(job: ServeJob, console: Console) -> None:
    """The job of kind `serve`: returns when it is interrupted (Ctrl-C, SIGTERM), or replaced by a later one.

    Raises `ModelSourceError`, `TrackingError`, `ClusterError` and `JobFailed`.
    """
    section = job.serve
    source, served = identify(section.model, get_tracking_uri(job))
    model = fetch_model(source, get_tracking_uri(job))
    if not os.environ.get("RAY_ADDRESS"):
        _refuse_a_taken_port(section)
    place = cluster.connect(job.whole_cluster)
    console.header(
        f"serve {job.name}", {"model": f"{served} ({section.model})", "replicas": _sizes(section), "on": place}
    )
    with Deployment(job, model, served) as deployment:
        try:
            deployment.start()
            console.say(f"  ready     {deployment.url}  (POST {deployment.url.rstrip('/')}/dehaze; Ctrl-C ends it)")
            for news in deployment.news():
                console.say(f"  {news}")
        except KeyboardInterrupt:
            console.say(f"\n  stopping: requests in work get up to {GRACE_S:g} s")
    console.footer("stopped: nothing is served any more" if deployment.is_ours else "ended", {})


def identify(source: str, tracking: str) -> tuple[str, ServedModel]:
    """The source with an alias resolved to the version that it means now, and what users may know of it.

    Raises `TrackingError`.
    """
    path = source.partition("?")[0].rstrip("/")
    if not source.startswith("models:/"):
        name = path.removeprefix("runs:/") if source.startswith(MLFLOW_SCHEMES) else posixpath.basename(path)
        return source, ServedModel(name, None)
    name, mark, version = path.removeprefix("models:/").replace("@", "/").partition("/")
    if not mark:  # models:/m-1234: a logged model that is not registered
        return source, ServedModel(name, None)
    number = Registry(tracking).find_version(name, version).number
    return f"models:/{name}/{number}", ServedModel(name, number)


def _sizes(section: ServeSection) -> str:
    low, high = section.replicas
    count = str(low) if low == high else f"{low} to {high}"
    gpus = f", {section.gpus_per_replica:g} GPU" if section.gpus_per_replica else ""
    return f"{count} of {section.cpus_per_replica:g} CPU{gpus}"


def _refuse_a_taken_port(section: ServeSection) -> None:
    family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ClusterError(f"serve.port: cannot listen at {section.host}, port {section.port}: {reason}") from None
