"""Connecting to Ray, quietly: to the cluster of `RAY_ADDRESS`, else to one started on this machine."""

import logging
import math
import os
import signal
from collections.abc import Mapping
from typing import Any

from corun_ray import PACKAGE
from corun_ray.core.errors import UserError

# Ray reads these when it is imported, so they are set first.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")

import ray
from google.protobuf.message import DecodeError
from ray._private import services
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]  # made at import
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoReply  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from corun_ray.config.jobs import ClusterSection
from corun_ray.service.cluster.autoscaling import can_autoscale
from corun_ray.service.cluster.local_node import starting_few_processes
from corun_ray.service.cluster.local_ray import LocalRayError, check_folder, find_folder
from corun_ray.service.cluster.object_store import describe_local_store, plan_object_store
from corun_ray.service.cluster.ports import (
    PortError,
    ask_for_ray,
    fetch_nodes,
    is_answering,
    read_patience_s,
    read_ray_address,
)
from corun_ray.service.cluster.tokens import describe_token_trouble, send_token
from corun_ray.service.errors import JobFailed, format_reason
from corun_ray.service.s3 import make_node_environment
from corun_ray.service.waiting import GaveUp, announce_wait, limit_wait

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job, whose runtime environment then holds our code already."""
LOCAL_MARK = "CORUN_LOCAL_RAY"
"""Set in this process and in all processes of the local Ray that it has started."""
JOIN_LIMIT_S = 60.0
"""How long joining a cluster that answers may take, unless CORUN_CONNECT_PATIENCE_S gives more."""
FIRST_WORD_S = 2.0
"""Every command that uses Ray waits for a local one; its screen stays blank no longer than this."""
VERSION_MISMATCH = "Version mismatch"
NO_NODE_HERE = (
    "it answers, but this machine is no node of it, as it must be to join; from elsewhere, corun-ray submit --address "
    "http://HOST:8265 sends jobs"
)
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


def is_local_ray() -> bool:
    """Return whether this process belongs to a local Ray that `connect` has started.

    The mark alone may come from a process that had one, and has started this one for another Ray.
    """
    return LOCAL_MARK in os.environ and not read_ray_address()


def describe_start() -> str:
    """Return what `connect` is about to do, for the person who waits."""
    address = read_ray_address()
    return f"joining the cluster at {address}" if address else "starting a local Ray"


def connect(*sizes: ClusterSection) -> str:
    """Connect to Ray and return a description of the place.

    A process connects once; later calls only check the sizes.

    `sizes` are those of the jobs to come. A local Ray gets as many logical CPUs as the largest job asks for, so that
    training workers and decoding tasks share a small machine. A cluster must really have them.

    Raises `ClusterError`.
    """
    # Ray Data sets its own level when it is imported, which may be after the first call.
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)

    # A job file with several jobs connects once, so a local Ray must fit the largest of them.
    if not ray.is_initialized():
        min_cpus = max((_count_cpus(size, size.max_workers) for size in sizes), default=1)
        _start_ray(min_cpus)

    for size in sizes:
        _check_size(size)

    address = read_ray_address()
    if not address:
        return f"a local Ray{describe_local_store()}"

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
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    address = read_ray_address()
    if address:
        _join_cluster(address, quiet)
    else:
        _start_local_ray(min_cpus, quiet)

    # ray.init() installs its own SIGTERM handler, which kills a process that is still closing files after 3 s.
    # Restore ours.
    if callable(sigterm_handler):
        signal.signal(signal.SIGTERM, sigterm_handler)


def _join_cluster(address: str, options: Mapping[str, Any]) -> None:
    """Join the cluster at an address.

    Raises `ClusterError` where none answers: at once where the port tells, else within a minute.
    """
    failure = f"RAY_ADDRESS: no Ray cluster at {address}"
    gave_up = f"{failure} (it listens, and does not let this process join; look at its nodes: ray status)"

    # Workers need our code; those of a submitted job have it already.
    environment: dict[str, Any] = {} if IN_RAY_JOB in os.environ else {"py_modules": [str(PACKAGE)]}
    environment["env_vars"] = make_node_environment()
    try:
        limit_s = max(JOIN_LIMIT_S, read_patience_s())
        place = _find_cluster() if address == "auto" else address
        ask_for_ray(place)
        trouble = _describe_node_trouble(place)
        if trouble:
            raise ClusterError(f"{failure} ({trouble})")

        with announce_wait(f"the cluster at {address}"), limit_wait(limit_s, gave_up):
            ray.init(address=address, runtime_env=environment, **options)
    except ClusterError:
        raise
    except PortError as error:
        raise ClusterError(str(error)) from None
    except GaveUp:
        raise ClusterError(gave_up) from None
    except AuthenticationError:
        raise ClusterError(f"{failure} ({describe_token_trouble()})") from None
    except Exception as error:
        reason = format_reason(error)
        if VERSION_MISMATCH in reason:
            reason += "; both sides need the same Ray and the same Python, as one image has them"
        raise ClusterError(f"{failure} ({reason})") from None


def _find_cluster() -> str:
    """Return the address of the head that runs on this machine; raises `ConnectionError` where there is none."""
    # Ray sends a token to a cluster that it finds itself, without being told to.
    send_token()
    return services.get_ray_address_from_environment("auto", None)


def _describe_node_trouble(address: str) -> str:
    """Return why this process cannot join by the node on this machine; the text is empty where it can.

    Ray waits a minute for such a node; where one is there and hangs, Ray ends this process without a word.
    """
    own_ids = set(services.find_node_ids())
    if not own_ids:
        return NO_NODE_HERE

    # A Ray of another version may encode its list in another way, and says itself that it is another.
    try:
        nodes = GetAllNodeInfoReply.FromString(fetch_nodes(address)).node_info_list
    except DecodeError:
        return ""
    if not nodes:
        return ""

    here = [node for node in nodes if node.node_id.hex() in own_ids and node.state == GcsNodeInfo.GcsNodeState.ALIVE]
    if not here:
        return NO_NODE_HERE
    if any(is_answering(node.node_manager_address, node.node_manager_port) for node in here):
        return ""
    ports = ", ".join(f"{node.node_manager_address}:{node.node_manager_port}" for node in here)
    return f"its head answers, its node on this machine does not ({ports}): look at that process, raylet, and its logs"


def _start_local_ray(min_cpus: float, options: Mapping[str, Any]) -> None:
    """Start Ray on this machine.

    Raises `ClusterError` where its folder is no good, and `JobFailed` where it does not start for another reason.
    """
    try:
        check_folder()
    except LocalRayError as error:
        raise ClusterError(str(error)) from None

    # Ray's processes inherit the environment.
    os.environ[LOCAL_MARK] = "1"
    # Nobody takes the one node of a local Ray away, so a training starts no process that looks for notices.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    num_cpus = max(os.cpu_count() or 1, math.ceil(min_cpus))
    store_bytes = plan_object_store()
    try:
        with announce_wait("a local Ray to start", first_word_s=FIRST_WORD_S), starting_few_processes():
            ray.init(
                address="local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=store_bytes, **options
            )
    except Exception as error:
        folder, _ = find_folder()
        raise JobFailed(
            f"a local Ray does not start: {format_reason(error)} (its logs: {folder}/ray/session_latest/logs; "
            "a folder with room and RAY_TMPDIR, a machine with less load, or a cluster by RAY_ADDRESS may help)"
        ) from None


def _check_size(size: ClusterSection) -> None:
    """Check that Ray has the resources of the smallest job size, or may add them.

    Raises `ClusterError` where it has not.
    """
    # What the fewest workers need, and the decoding tasks beside them.
    total = ray.cluster_resources()
    needed = {
        "CPU": _count_cpus(size, size.min_workers),
        "GPU": size.min_workers * size.gpus_per_worker,
    }
    for kind, amount in needed.items():
        if amount > total.get(kind, 0) and not can_autoscale():
            raise ClusterError(f"cluster: {amount:g} {kind}s are needed in all, Ray has {total.get(kind, 0):g}")


def _count_cpus(size: ClusterSection, workers: int) -> float:
    """Return the logical CPUs of a job with these workers.

    The CPUs of the decoding tasks are included.
    """
    return workers * size.cpus_per_worker + size.data_cpus
