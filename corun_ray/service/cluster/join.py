"""Joining a cluster for one job: connected, with its local folders on every node, and with room for it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from corun_ray.config.jobs import DehazeJob, DepthJob, EvaluateJob, Job
from corun_ray.service.cluster.autoscaling import can_autoscale, read_node_types
from corun_ray.service.cluster.connect import connect
from corun_ray.service.cluster.room import NodeRoom, await_room, has_gpus, read_nodes, request_actor, request_job
from corun_ray.service.cluster.shared import list_other_nodes, refuse_unshared, refuse_unshared_places

GPU_ADVICE = (
    "  no node has a GPU now, so this runs on CPUs; cluster.gpus_per_worker: 1 in a job file waits for the autoscaler "
    "to add one"
)
NO_PLACES: Mapping[str, str] = MappingProxyType({})


def join_cluster(job: Job, say: Callable[[str], None], places: Mapping[str, str] = NO_PLACES) -> str:
    """Connect to Ray, wait for room for a job, and return a description of the place.

    `say` is given the lines that tell a person of a wait. `places` are folders that the nodes read beside those of the
    job's keys.

    Raises `ClusterError` for what the job can never have, and for a local folder that some node does not see.
    """
    connect(job.whole_cluster)
    refuse_unshared(job, say, places)
    seen, nodes = list_other_nodes(has_pool=True), read_nodes()
    if misses_gpus(job, nodes):
        say(GPU_ADVICE)
    await_room(request_job(job, nodes), say)

    # Nodes that have come meanwhile may not see a local folder either.
    if list_other_nodes(has_pool=True).keys() - seen.keys():
        refuse_unshared(job, say, places)

    # The place as it is now, with the nodes that have come.
    return connect()


def misses_gpus(job: Job, nodes: Sequence[NodeRoom]) -> bool:
    """Tell whether a batch job takes CPUs because the autoscaler has added no GPU yet, and the job asks for none."""
    is_batch = isinstance(job, EvaluateJob | DehazeJob | DepthJob)
    if not is_batch or job.cluster.gpus_per_worker or has_gpus(nodes) or not can_autoscale():
        return False
    types = read_node_types()
    return types is None or any(one.resources.get("GPU", 0) >= 1 for one in types)


def join_for_tasks(
    say: Callable[[str], None], written: Mapping[str, str] = NO_PLACES, read: Mapping[str, str] = NO_PLACES
) -> str:
    """Connect to Ray, wait for room for one task, and return a description of the place.

    The tasks write and read these places. Raises `ClusterError`.
    """
    connect()
    seen = list_other_nodes()
    refuse_unshared_places(seen, written, read, say)
    await_room(request_actor([]), say)

    added = {node_id: address for node_id, address in list_other_nodes().items() if node_id not in seen}
    refuse_unshared_places(added, written, read, say)
    return connect()
