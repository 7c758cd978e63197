"""Serving a model on Ray Serve, seen from the driver: it deploys, tells what happens, and ends all at its own end."""

import os
import posixpath
import socket

from corun_ray.config.jobs import ServeJob
from corun_ray.config.jobserve import Serve
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.cluster.connect import ClusterError
from corun_ray.service.models.registry import Registry
from corun_ray.service.models.sources import MLFLOW_SCHEMES, fetch_model
from corun_ray.service.models.tracking import tracking_uri
from corun_ray.service.serve.deployment import GRACE_S, Deployment
from corun_ray.service.serve.messages import Served
from corun_ray.service.telemetry.console import Console


def run_serving(job: ServeJob, console: Console) -> None:
    """The job of kind `serve`: returns when it is interrupted (Ctrl-C, SIGTERM), or replaced by a later one.

    Raises `ModelSourceError`, `TrackingError`, `ClusterError` and `JobFailed`.
    """
    section = job.serve
    source, served = identify(section.model, tracking_uri(job))
    model = fetch_model(source, tracking_uri(job))
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


def identify(source: str, tracking: str) -> tuple[str, Served]:
    """The source with an alias resolved to the version that it means now, and what users may know of it.

    Raises `TrackingError`.
    """
    path = source.partition("?")[0].rstrip("/")
    if not source.startswith("models:/"):
        name = path.removeprefix("runs:/") if source.startswith(MLFLOW_SCHEMES) else posixpath.basename(path)
        return source, Served(name, None)
    name, mark, version = path.removeprefix("models:/").replace("@", "/").partition("/")
    if not mark:  # models:/m-1234: a logged model that is not registered
        return source, Served(name, None)
    number = Registry(tracking).version(name, version).number
    return f"models:/{name}/{number}", Served(name, number)


def _sizes(section: Serve) -> str:
    low, high = section.replicas
    count = str(low) if low == high else f"{low} to {high}"
    gpus = f", {section.gpus_per_replica:g} GPU" if section.gpus_per_replica else ""
    return f"{count} of {section.cpus_per_replica:g} CPU{gpus}"


def _refuse_a_taken_port(section: Serve) -> None:
    family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ClusterError(f"serve.port: cannot listen at {section.host}, port {section.port}: {reason}") from None
