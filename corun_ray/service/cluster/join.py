"""Joining a cluster for one job: connected, with its local folders on every node, and with room for it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from corun_ray.config.jobs import Job
from corun_ray.service.cluster.connect import connect
from corun_ray.service.cluster.room import await_room, read_nodes, request_actor, request_job
from corun_ray.service.cluster.shared import list_other_nodes, refuse_unshared, refuse_unshared_places

NO_PLACES: Mapping[str, str] = MappingProxyType({})


def join_cluster(job: Job, say: Callable[[str], None], places: Mapping[str, str] = NO_PLACES) -> str:
    """Connect to Ray, wait for room for a job, and return a description of the place.

    `say` is given the lines that tell a person of a wait. `places` are folders that the nodes read beside those of the
    job's keys.

    Raises `ClusterError` for what the job can never have, and for a local folder that some node does not see.
    """
    place = connect(job.whole_cluster)
    refuse_unshared(job, say, places)
    await_room(request_job(job, read_nodes()), say)
    return place


def join_for_tasks(
    say: Callable[[str], None], written: Mapping[str, str] = NO_PLACES, read: Mapping[str, str] = NO_PLACES
) -> str:
    """Connect to Ray, wait for room for one task, and return a description of the place.

    The tasks write and read these places. Raises `ClusterError`.
    """
    place = connect()
    refuse_unshared_places(list_other_nodes(), written, read, say)
    await_room(request_actor([]), say)
    return place
