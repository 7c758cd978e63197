"""A served model as an application of Ray Serve: the HTTP app and its replicas, started, watched and ended.

`run_serving` is the job of kind `serve`: it deploys, tells about changes, and removes the application at its end.
"""

import contextlib
import io
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
from corun_ray.core.errors import explain_stop
from corun_ray.core.inference.restore import MIN_SIDE_PX
from corun_ray.service.cluster.connect import ClusterError, connect
from corun_ray.service.cluster.ports import read_ray_address
from corun_ray.service.cluster.room import await_room, read_nodes, refuse_misfit, request_job
from corun_ray.service.errors import JobFailed, find_root_cause, format_reason, join_lines
from corun_ray.service.models.registry import Registry
from corun_ray.service.models.sources import Model, fetch_model
from corun_ray.service.models.tracking import MLFLOW_SCHEMES, get_tracking_uri
from corun_ray.service.serve.app import HttpApp, RequestLimits
from corun_ray.service.serve.messages import ServedModel
from corun_ray.service.serve.replica import Replica, ReplicaOptions
from corun_ray.service.serve.uploads import UploadLimits
from corun_ray.service.telemetry.console import Console

POLL_S = 2.0
"""Between two looks at the application's state."""
GRACE_S = 10.0
"""Time for requests in work when the application ends."""
SHUTDOWN_OPTIONS: dict[str, Any] = {"graceful_shutdown_timeout_s": GRACE_S, "graceful_shutdown_wait_loop_s": 0.5}
MAX_HEALTH_REQUESTS = 16
"""Health requests of a replica, beside the requests to dehaze."""
APP_REQUESTS_FACTOR = 10
"""The HTTP app takes so many times the requests in flight, so that it can refuse the rest itself."""
ALL_INTERFACES = ("0.0.0.0", "::")


# --- The application ---


def build_application(section: ServeSection, model: Model, served: ServedModel, owner: str) -> serve.Application:
    """Build the HTTP app and its replicas for Ray Serve.

    `owner` identifies the deployment, and is known to the HTTP app.
    """
    _, max_replicas = section.replicas
    limits = RequestLimits(
        upload=UploadLimits(section.max_upload_mib, section.max_megapixels, MIN_SIDE_PX),
        max_in_flight=section.max_queued + max_replicas * section.max_batch,
        timeout_s=section.timeout_s,
    )

    # The app mostly waits, so it reserves no CPU.
    app = serve.deployment(
        name="door",
        max_ongoing_requests=APP_REQUESTS_FACTOR * limits.max_in_flight,
        max_queued_requests=limits.max_in_flight,
        **SHUTDOWN_OPTIONS,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(HttpApp))
    return app.bind(_build_replicas(section, model, limits), served, limits, owner)


def _build_replicas(section: ServeSection, model: Model, limits: RequestLimits) -> serve.Application:
    """Build the part of the application that restores images."""
    # A fixed number of replicas, or as many as keep each at one full batch.
    low, high = section.replicas
    amount: dict[str, Any] = {"num_replicas": low}
    if low < high:
        scaling = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": section.max_batch}
        amount = {"autoscaling_config": scaling}

    replicas = serve.deployment(
        name="restorer",
        max_ongoing_requests=limits.max_in_flight + MAX_HEALTH_REQUESTS,
        **SHUTDOWN_OPTIONS,
        **amount,
        ray_actor_options={
            "num_cpus": section.cpus_per_replica,
            "num_gpus": section.gpus_per_replica,
            "runtime_env": {"env_vars": _make_environment(section, limits.upload)},
        },
    )(Replica)

    # The model goes through the object store: each replica builds its network from there.
    options = ReplicaOptions(
        threads=max(1, int(section.cpus_per_replica)),
        memory_mib=section.memory_mib,
        gpu_share=section.gpus_per_replica,
        max_batch=section.max_batch,
        batch_wait_s=section.batch_wait_s,
    )
    return replicas.bind({"model": ray.put(model)}, options)


def _make_environment(section: ServeSection, limits: UploadLimits) -> dict[str, str]:
    """Return the environment variables of a replica."""
    # OpenCV enforces the limit too, for files that deceive the readers of headers.
    environment = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(limits.max_pixels)}

    # Without a GPU of its own, a replica must not use the node's.
    if not section.gpus_per_replica:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


class Deployment:
    """An application on the cluster's Ray Serve.

    Ray Serve is started where it does not run, and ended with its last application.
    """

    def __init__(self, job: ServeJob, model: Model, served: ServedModel) -> None:
        self._name, self._section = job.name, job.serve
        self._model, self._served = model, served
        self._owner = uuid.uuid4().hex

        # Without proxies, Ray Serve does not run yet.
        self._starts_serve = not serve.status().proxies

        self.is_ours = False
        """Whether the application is deployed, and has not been replaced or deleted as far as is known."""
        self.url = ""

    def __enter__(self) -> "Deployment":
        return self

    def start(self) -> None:
        """Deploy the application; return when it answers.

        Raises `JobFailed`.
        """
        section = self._section
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": section.host, "port": section.port})
            self.is_ours = True
            app = build_application(section, self._model, self._served, self._owner)
            serve.run(app, name=self._name, route_prefix=section.path)
        except (RayServeException, RayError, RuntimeError, TimeoutError, ValueError) as error:
            raise JobFailed(f"{self._name}: Ray Serve could not start it: {find_root_cause(str(error))}") from None
        self.url = self._find_url()

    def _find_url(self) -> str:
        """Return the application's URL.

        A Ray Serve that ran before keeps its own address, whatever the job file says.
        """
        client = _get_global_client()
        assert client is not None
        http = client.http_config
        host = socket.gethostname() if http.host in ALL_INTERFACES else http.host

        # IPv6 addresses stand in brackets.
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{http.port}{self._section.path}"

    def watch(self) -> Iterator[str]:
        """Yield a line at every change of the application's state.

        Ends when the application is deleted or replaced by someone else. Raises `JobFailed`.
        """
        status = ApplicationStatus.RUNNING

        while self.is_ours:
            time.sleep(POLL_S)
            try:
                now = serve.status().applications.get(self._name)
            except (RayServeException, RayError) as error:
                raise JobFailed(f"{self._name}: Ray Serve is lost: {format_reason(error)}") from None

            if now is None:
                self.is_ours = False
                yield "it was deleted by someone else"
            elif self._is_replaced():
                self.is_ours = False
                yield f"another deployment has taken the name {self._name}"
            elif now.status != status:
                # Such as `unhealthy`, and Ray Serve's reason.
                status = now.status
                words = status.value.lower().replace("_", " ")
                yield f"{words} {join_lines(now.message)}".rstrip()

    def _is_replaced(self) -> bool:
        """Ask the application whether it belongs to another deployment."""
        try:
            owner = serve.get_app_handle(self._name).get_owner.remote().result(timeout_s=POLL_S)
        except (RayServeException, RayError, TimeoutError):
            # An application that does not answer is not replaced: Ray Serve's status tells its state.
            return False
        return bool(owner != self._owner)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not ray.is_initialized():
            return

        # An application or a Ray Serve that is lost needs no end.
        with contextlib.suppress(RayServeException, RayError):
            self.is_ours = self.is_ours and not self._is_replaced()
            others = set(serve.status().applications)
            if self.is_ours:
                others.discard(self._name)

            if self._starts_serve and not others:
                # Serve's controller ends itself within a task, and Ray prints a long message about that.
                with contextlib.redirect_stdout(io.StringIO()):
                    serve.shutdown()
            elif self.is_ours:
                serve.delete(self._name)


# --- The job of kind `serve` ---


def run_serving(job: ServeJob, console: Console) -> None:
    """Serve a model until an interrupt or a later deployment.

    Interrupts are Ctrl-C and SIGTERM. Raises `ModelSourceError`, `TrackingError`, `ClusterError` and `JobFailed`.
    """
    section = job.serve

    # Fetch the model before Ray starts: a wrong source is reported at once.
    source, served = identify(section.model, get_tracking_uri(job))
    model = fetch_model(source, get_tracking_uri(job))
    if not read_ray_address():
        _check_port(section)

    with explain_stop(lambda: "the model was not served yet"):
        place = _join_cluster(job, console)
    facts = {"model": f"{served} ({section.model})", "replicas": _describe_replicas(section), "on": place}
    console.header(f"serve {job.name}", facts)

    # Leaving the context removes the application.
    with Deployment(job, model, served) as deployment:
        try:
            deployment.start()
            console.say(f"  ready     {deployment.url}  (POST {deployment.url.rstrip('/')}/dehaze; Ctrl-C ends it)")
            for line in deployment.watch():
                console.say(f"  {line}")
        except KeyboardInterrupt:
            console.say(f"\n  stopping: requests in work get up to {GRACE_S:g} s")
    console.footer("stopped: the model is no longer served" if deployment.is_ours else "ended", {})


def _join_cluster(job: ServeJob, console: Console) -> str:
    """Connect to Ray, wait for room for the replicas, and return a description of the place.

    Raises `ClusterError`.
    """
    place = connect(job.whole_cluster)
    request = request_job(job, read_nodes())
    if job.name in serve.status().applications:
        # The replicas of an earlier deployment leave their room to ours.
        refuse_misfit(request)
    else:
        await_room(request, console.say)
    return place


def identify(source: str, tracking: str) -> tuple[str, ServedModel]:
    """Resolve a source's alias, and name the model for users.

    An alias may move while the model is served; a version does not. Raises `TrackingError`.
    """
    path = source.partition("?")[0].rstrip("/")

    # A file or folder is called by its last part; its path is nobody else's business.
    if not source.startswith(MLFLOW_SCHEMES):
        return source, ServedModel(posixpath.basename(path), None)
    if source.startswith("runs:/"):
        return source, ServedModel(path.removeprefix("runs:/"), None)

    # `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or `models:/m-1234`, which is logged but not registered.
    name, mark, version = path.removeprefix("models:/").replace("@", "/").partition("/")
    if not mark:
        return source, ServedModel(name, None)
    number = Registry(tracking).find_version(name, version).number
    return f"models:/{name}/{number}", ServedModel(name, number)


def _describe_replicas(section: ServeSection) -> str:
    """Return number and size of the replicas for the header."""
    low, high = section.replicas
    count = str(low) if low == high else f"{low} to {high}"
    gpus = f", {section.gpus_per_replica:g} GPU" if section.gpus_per_replica else ""
    return f"{count} of {section.cpus_per_replica:g} CPU{gpus}"


def _check_port(section: ServeSection) -> None:
    """Refuse an address at which this machine cannot listen.

    Raises `ClusterError`.
    """
    family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
    with socket.socket(family) as probe:
        # As Ray Serve does: connections of an earlier server that are still closing are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ClusterError(f"serve.port: cannot listen at {section.host}, port {section.port}: {reason}") from None
