"""Connecting to Ray, quietly: the cluster of `RAY_ADDRESS`, else one started on this machine."""

import logging
import math
import os
import signal
from typing import Any

from corun_ray import PACKAGE
from corun_ray.core.errors import UserError

# Read by Ray at import.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")

import ray

from corun_ray.config.jobs import ClusterSection

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job, whose runtime environment then holds our code already."""


class ClusterError(UserError):
    """A cluster that cannot be reached, or has less than the job needs; the message is one line."""


def connect(*needs: ClusterSection) -> str:
    """Connects (once a process) and returns what to call the place; raises `ClusterError`.

    `needs` are the sizes of the jobs to come. A local Ray gets as many logical CPUs as the largest asks for, so that
    training workers and decoding tasks share a small machine; a cluster must really have them.
    """
    if not ray.is_initialized():
        _start_or_join(max((_cpus_needed(need, need.max_workers) for need in needs), default=1))
    for need in needs:
        _check_size(need)
    if not os.environ.get("RAY_ADDRESS"):
        return "a local Ray"
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{os.environ['RAY_ADDRESS']} ({nodes} node{'s' * (nodes != 1)})"


def _cpus_needed(cluster: ClusterSection, workers: int) -> float:
    return workers * cluster.cpus_per_worker + cluster.data_cpus


def _start_or_join(min_cpus: float) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Ray Data and Tune log an error with tracebacks, and give it to us as well.
    levels = {
        "ray": logging.ERROR,
        "ray.train": logging.ERROR,
        "ray.data": logging.CRITICAL,
        "ray.tune": logging.CRITICAL,
        "ray.serve": logging.CRITICAL,
    }
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        environment = {} if IN_RAY_JOB in os.environ else {"py_modules": [str(PACKAGE)]}
        try:
            ray.init(address=os.environ["RAY_ADDRESS"], runtime_env=environment, **quiet)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise ClusterError(f"RAY_ADDRESS: no Ray cluster at {os.environ['RAY_ADDRESS']} ({reason})") from None
    else:
        num_cpus = max(os.cpu_count() or 1, math.ceil(min_cpus))
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    if on_sigterm is signal.default_int_handler:
        # Ray has taken SIGTERM for itself, and aborts a process that is still closing what it opened 3 s later.
        signal.signal(signal.SIGTERM, on_sigterm)


def _check_size(cluster: ClusterSection) -> None:
    total = ray.cluster_resources()
    workers = cluster.min_workers
    needed = {"CPU": _cpus_needed(cluster, workers), "GPU": workers * cluster.gpus_per_worker}
    for kind, amount in needed.items():
        if amount > total.get(kind, 0):
            raise ClusterError(f"cluster: {amount:g} {kind}s are needed in all, Ray has {total.get(kind, 0):g}")
