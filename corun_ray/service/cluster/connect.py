"""Connecting to Ray, quietly: to the cluster of `RAY_ADDRESS`, else to one started on this machine."""

import logging
import math
import os
import signal
from typing import Any

from corun_ray import PACKAGE
from corun_ray.core.errors import UserError

# Ray reads these when it is imported, so they are set first.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")

import ray

from corun_ray.config.jobs import ClusterSection
from corun_ray.service.s3 import make_node_environment

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job, whose runtime environment then holds our code already."""
LOG_LEVELS = {
    "ray": logging.ERROR,
    "ray.train": logging.ERROR,
    # These log every error with its traceback, and also raise it to us.
    "ray.data": logging.CRITICAL,
    "ray.tune": logging.CRITICAL,
    "ray.serve": logging.CRITICAL,
}


class ClusterError(UserError):
    """A cluster that cannot be reached, or has less than the job needs; the message is one line."""


def connect(*sizes: ClusterSection) -> str:
    """Connect to Ray and return a description of the place.

    A process connects once; later calls only check the sizes.

    `sizes` are those of the jobs to come. A local Ray gets as many logical CPUs as the largest job asks for, so that
    training workers and decoding tasks share a small machine. A cluster must really have them.

    Raises `ClusterError`.
    """
    # A job file with several jobs connects once, so a local Ray must fit the largest of them.
    if not ray.is_initialized():
        min_cpus = max((_count_cpus(size, size.max_workers) for size in sizes), default=1)
        _start_ray(min_cpus)

    for size in sizes:
        _check_size(size)

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "a local Ray"

    num_nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{address} ({format_nodes(num_nodes)})"


def format_nodes(count: int) -> str:
    """Return a number of nodes as text."""
    return "1 node" if count == 1 else f"{count} nodes"


def _start_ray(min_cpus: float) -> None:
    """Join the cluster of RAY_ADDRESS, else start Ray here.

    A Ray that starts here gets at least `min_cpus` logical CPUs.
    """
    # Ray's own lines would drown those of the job.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)

    sigterm_handler = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # Workers need our code; those of a submitted job have it already.
        environment: dict[str, Any] = {} if IN_RAY_JOB in os.environ else {"py_modules": [str(PACKAGE)]}
        environment["env_vars"] = make_node_environment()
        try:
            ray.init(address=address, runtime_env=environment, **quiet)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise ClusterError(f"RAY_ADDRESS: no Ray cluster at {address} ({reason})") from None
    else:
        # Nobody takes the one node of a local Ray away, so a training starts no process that looks for notices.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

        num_cpus = max(os.cpu_count() or 1, math.ceil(min_cpus))
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)

    # ray.init() installs its own SIGTERM handler, which kills a process that is still closing files after 3 s.
    # Restore ours.
    if sigterm_handler is signal.default_int_handler:
        signal.signal(signal.SIGTERM, sigterm_handler)


def _check_size(size: ClusterSection) -> None:
    """Check that Ray has the resources of the smallest job size.

    Raises `ClusterError` where it has not.
    """
    # What the fewest workers need, and the decoding tasks beside them.
    total = ray.cluster_resources()
    needed = {
        "CPU": _count_cpus(size, size.min_workers),
        "GPU": size.min_workers * size.gpus_per_worker,
    }
    for kind, amount in needed.items():
        if amount > total.get(kind, 0):
            raise ClusterError(f"cluster: {amount:g} {kind}s are needed in all, Ray has {total.get(kind, 0):g}")


def _count_cpus(size: ClusterSection, workers: int) -> float:
    """Return the logical CPUs of a job with these workers.

    The CPUs of the decoding tasks are included.
    """
    return workers * size.cpus_per_worker + size.data_cpus
