"""Room on a cluster: what a job needs at one time, whether the nodes can ever give it, and the wait until they do.

Ray itself waits for room in silence and without end, also where no node is large enough.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray import ActorID, PlacementGroupID
from ray._private.state import available_resources_per_node, state
from ray._raylet import RAY_NODE_GROUP_KEY  # type: ignore[attr-defined]  # compiled
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # made at import
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from corun_ray.config.jobs import ClusterSection, Job, ServeJob, TrainingJob
from corun_ray.service.cluster.autoscaling import Launches, NodeType, can_autoscale, read_launches, read_node_types
from corun_ray.service.cluster.connect import ClusterError
from corun_ray.service.waiting import FIRST_WORD_S, WORD_EVERY_S, Say

Amounts = Mapping[str, float]
"""Resources by kind: `{"CPU": 4.0, "GPU": 1.0}`."""

KINDS = ("CPU", "GPU")
LOOK_EVERY_S = 1.0
FORGET_S = 10.0
"""Ray Train gives a placement group up after a minute and asks for another: a gap of less ends no wait."""
PENDING_STATES = ("PENDING", "RESCHEDULING")
ROUNDING = 1e-6
WORKER_KEYS = "cluster.workers, cluster.cpus_per_worker, cluster.gpus_per_worker"
REPLICA_KEYS = "serve.replicas, serve.cpus_per_replica, serve.gpus_per_replica"


# --- What is needed, and what there is ---


@dataclass(frozen=True)
class RoomRequest:
    """Processes of one size that must have room at the same time."""

    who: str
    """What one of them is: `worker`."""
    count: int
    each: Amounts
    decodes: bool = False
    """Whether one more CPU must be free for a task that decodes images."""
    keys: str = ""
    """The keys of a job file by which less is asked for."""

    def __str__(self) -> str:
        amounts = format_amounts(self.each)
        text = f"1 {self.who} of {amounts}" if self.count == 1 else f"{self.count} {self.who}s of {amounts} each"
        return f"{text}, and 1 CPU to decode images" if self.decodes else text

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The request as bundles of a placement group."""
        bundles = [dict(self.each) for _ in range(self.count)]
        if self.decodes:
            bundles.append({"CPU": 1.0})
        return bundles

    def fits(self, rooms: Sequence[Amounts]) -> bool:
        """Tell whether the request fits into nodes with this room."""
        if not self.decodes:
            return self._fit_processes(rooms)

        # Try each node as the one that decodes.
        for number, room in enumerate(rooms):
            if room.get("CPU", 0) >= 1 - ROUNDING:
                reduced = {**room, "CPU": room["CPU"] - 1}
                if self._fit_processes([*rooms[:number], reduced, *rooms[number + 1 :]]):
                    return True
        return False

    def _fit_processes(self, rooms: Sequence[Amounts]) -> bool:
        return sum(count_fitting(self.each, room) for room in rooms) >= self.count


@dataclass(frozen=True)
class NodeRoom:
    """A living node's resources: all of them, and what is free now."""

    total: Amounts
    free: Amounts
    node_type: str = ""
    """The name of its type, where an autoscaler has added it."""


def count_fitting(each: Amounts, room: Amounts) -> int:
    """Count the processes that fit into one node's room."""
    counts = []
    for kind, need in each.items():
        # A share of a GPU is one of a single GPU.
        if kind == "GPU" and 0 < need < 1:
            counts.append(math.floor(room.get(kind, 0) + ROUNDING) * math.floor(1 / need + ROUNDING))
        elif need:
            counts.append(math.floor(room.get(kind, 0) / need + ROUNDING))
    return min(counts)


def read_nodes() -> list[NodeRoom]:
    """Read the room of every living node of the connected cluster."""
    free = available_resources_per_node()
    rooms = []
    for node in ray.nodes():
        if node["Alive"]:
            node_type = node["Labels"].get(RAY_NODE_GROUP_KEY, "")
            rooms.append(NodeRoom(node["Resources"], free.get(node["NodeID"], {}), node_type))
    return rooms


def request_workers(size: ClusterSection, decodes: bool = True) -> RoomRequest:
    """Return what the fewest workers of a training need."""
    each = {"CPU": size.cpus_per_worker}
    if size.gpus_per_worker:
        each["GPU"] = size.gpus_per_worker
    return RoomRequest("worker", size.min_workers, each, decodes, WORKER_KEYS)


def request_actor(nodes: Iterable[NodeRoom], wants_gpu: bool = False) -> RoomRequest:
    """Return what the first actor of a batch job needs: a GPU where there is any, or one is asked for, else a CPU."""
    if wants_gpu:
        return RoomRequest("process", 1, {"GPU": 1.0}, keys="cluster.gpus_per_worker")
    return RoomRequest("process", 1, {"GPU": 1.0} if has_gpus(nodes) else {"CPU": 1.0})


def has_gpus(nodes: Iterable[NodeRoom]) -> bool:
    """Tell whether any node has a GPU."""
    return any(node.total.get("GPU", 0) >= 1 for node in nodes)


def request_job(job: Job, nodes: Iterable[NodeRoom]) -> RoomRequest:
    """Return the least that a job needs at one time; of a search, that is one trial."""
    if isinstance(job, TrainingJob):
        return request_workers(job.cluster)
    if isinstance(job, ServeJob):
        size = job.whole_cluster
        each = request_workers(size).each
        return RoomRequest("replica", size.min_workers, each, keys=REPLICA_KEYS)
    return request_actor(nodes, job.cluster.gpus_per_worker > 0)


# --- Text ---


def format_amounts(amounts: Amounts) -> str:
    """Return resources as text: `4 CPUs and 1 GPU`."""
    return " and ".join(format_amount(kind, amount) for kind, amount in amounts.items())


def format_amount(kind: str, amount: float) -> str:
    """Return the amount of one resource as text."""
    return f"{amount:g} {kind}" if amount == 1 else f"{amount:g} {kind}s"


def describe_totals(each: Iterable[str], nodes: Sequence[NodeRoom]) -> str:
    """Describe the largest node and all nodes together, of some kinds of resources."""
    kinds = [kind for kind in KINDS if kind in each]
    largest = max((node.total for node in nodes), key=lambda total: [total.get(kind, 0) for kind in reversed(kinds)])
    texts = [format_amount(kind, largest.get(kind, 0)) for kind in kinds]
    text = f"the largest node has {' and '.join(texts)}"
    if len(nodes) == 1:
        return text
    sums = [format_amount(kind, sum(node.total.get(kind, 0) for node in nodes)) for kind in kinds]
    return f"{text}, {len(nodes)} nodes together {' and '.join(sums)}"


def describe_free(each: Iterable[str], nodes: Sequence[NodeRoom]) -> str:
    """Describe what is free now: `0 of 6 CPUs`, and the most on one node where that is less."""
    texts = []
    for kind in (kind for kind in KINDS if kind in each):
        total = sum(node.total.get(kind, 0) for node in nodes)
        free = [node.free.get(kind, 0) for node in nodes]
        text = f"{sum(free):g} of {format_amount(kind, total)}"
        texts.append(f"{text} (at most {max(free):g} on one node)" if max(free) < sum(free) else text)
    return f"free now: {', '.join(texts)}"


# --- Room that there can never be ---


def refuse_misfit(request: RoomRequest, owner: str = "cluster") -> None:
    """Refuse what the connected cluster can never give, neither by its nodes nor by those that it may add.

    Where nothing tells which nodes it may add, it is trusted to add one that fits. Raises `ClusterError`.
    """
    nodes = read_nodes()
    if request.fits([node.total for node in nodes]):
        return

    lack = f"{owner}: no room for {request}, ever: {describe_totals(request.each, nodes)}"
    if can_autoscale():
        types = read_node_types()
        if types is None or request.fits(list_possible_rooms(request, nodes, types)):
            return
        lack = f"{lack}; {describe_largest_type(request.each, types)}"
    advice = f"ask for less ({request.keys}) or add nodes" if request.keys else "add nodes"
    raise ClusterError(f"{lack}; {advice}")


def list_possible_rooms(request: RoomRequest, nodes: Iterable[NodeRoom], types: Iterable[NodeType]) -> list[Amounts]:
    """List the rooms of the nodes that stay and of as many others as the cluster may add, and the request can use."""
    names = {node_type.name for node_type in types}
    rooms = [node.total for node in nodes if node.node_type not in names]
    for node_type in types:
        # One node for each process, and one to decode.
        count = int(min(node_type.max_nodes, request.count + 1))
        rooms += [node_type.resources] * count
    return rooms


def describe_largest_type(each: Iterable[str], types: Sequence[NodeType]) -> str:
    """Describe the largest type of node that the autoscaler may add, by some kinds of resources."""
    if not types:
        return "the autoscaler adds no nodes"
    kinds = [kind for kind in KINDS if kind in each]
    largest = max(types, key=lambda one: [one.resources.get(kind, 0) for kind in reversed(kinds)])
    texts = [format_amount(kind, largest.resources.get(kind, 0)) for kind in kinds]
    limit = "" if math.isinf(largest.max_nodes) else f", at most {largest.max_nodes:g} of it"
    return f"the autoscaler's largest node type, {largest.name}, has {' and '.join(texts)}{limit}"


def refuse_misfits(jobs: Sequence[Job]) -> None:
    """Refuse jobs that the connected cluster can never run.

    Raises `ClusterError`.
    """
    nodes = read_nodes()
    for job in jobs:
        refuse_misfit(request_job(job, nodes), f"job {job.name}" if len(jobs) > 1 else "cluster")


# --- Waiting ---


class RoomWatch:
    """Puts a wait for room into words: within seconds, then every 15 s."""

    def __init__(
        self,
        can_grow: Callable[[], bool] = can_autoscale,
        read_launches: Callable[[], Launches] = read_launches,
        read: Callable[[], Sequence[NodeRoom]] = read_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._can_grow, self._read_launches, self._read, self._clock = can_grow, read_launches, read, clock
        self._since_s: float | None = None
        """When the present wait began; None: nothing waits."""
        self._seen_s = 0.0
        self._next_word_s = FIRST_WORD_S

    def update(self, requests: Sequence[RoomRequest]) -> str | None:
        """Return the line to show now that these requests wait for room, if any."""
        now_s = self._clock()
        if not requests:
            if self._since_s is not None and now_s - self._seen_s > FORGET_S:
                self._since_s = None
            return None

        # A wait begins, or goes on.
        if self._since_s is None:
            self._since_s, self._next_word_s = now_s, FIRST_WORD_S
        self._seen_s = now_s
        waited_s = now_s - self._since_s
        if waited_s < self._next_word_s:
            return None

        # The first line tells all, the later ones what has changed.
        is_first = self._next_word_s == FIRST_WORD_S
        self._next_word_s = waited_s + WORD_EVERY_S
        nodes = self._read()
        kinds = {kind for request in requests for kind in request.each}
        launches = self._describe_launches(requests)
        if not is_first:
            return f"still waiting for room after {waited_s:.0f} s; {describe_free(kinds, nodes)}{launches}"

        asked = " and ".join(map(str, requests))
        text = f"waiting for room for {asked}; {describe_totals(kinds, nodes)}; {describe_free(kinds, nodes)}"
        return f"{text}; the autoscaler may add nodes{launches}" if self._can_grow() else text

    def _describe_launches(self, requests: Sequence[RoomRequest]) -> str:
        """Describe what the autoscaler is at, if anything: `; starting now: 1 gpu`."""
        launches = self._read_launches()
        texts = [str(launches)] if str(launches) else []
        if any(request.each in launches.unmet for request in requests):
            texts.append("the autoscaler can add no node for that now")
        return "".join(f"; {text}" for text in texts)

    @property
    def waited_s(self) -> float:
        """Seconds that the present wait has taken."""
        return 0.0 if self._since_s is None else self._clock() - self._since_s


def await_room(request: RoomRequest, say: Say, limit_s: float = math.inf) -> None:
    """Wait until the connected cluster has room for a request, and say so.

    The room is not held: who called takes it at once. Raises `ClusterError` for what can never fit, and where there is
    no room within `limit_s`.
    """
    refuse_misfit(request)
    if request.fits([node.free for node in read_nodes()]):
        return

    # Stand in Ray's queue as the work itself would: an autoscaler sees it, and later requests come later.
    watch = RoomWatch()
    group = placement_group(request.bundles)
    try:
        while not group.wait(LOOK_EVERY_S):
            # A search may have ended with a trial that was stopped, whose controller has left its room.
            free_left_room()
            line = watch.update([request])
            if line is not None:
                say(f"  {line}")
            if watch.waited_s > limit_s:
                free = describe_free(request.each, read_nodes())
                raise ClusterError(f"cluster: no room for {request} within {limit_s:g} s; {free}")
    finally:
        _remove_group(group)
    if watch.waited_s >= FIRST_WORD_S:
        say(f"  there is room, after {watch.waited_s:.0f} s")


def _remove_group(group: PlacementGroup) -> None:
    """Give the room of a placement group back, and wait until it is free."""
    remove_placement_group(group)
    deadline_s = time.monotonic() + LOOK_EVERY_S
    while placement_group_table(group).get("state") != "REMOVED" and time.monotonic() < deadline_s:
        time.sleep(0.05)


def find_waiting_workers() -> list[RoomRequest]:
    """Find the workers of this job, in any of its processes, that wait for room."""
    job_id = ray.get_runtime_context().get_job_id()
    counts: Counter[tuple[tuple[str, float], ...]] = Counter()
    for group_id, group in placement_group_table().items():
        # The last bytes of the id are the job's.
        if group_id.endswith(job_id) and group["state"] in PENDING_STATES:
            counts.update(tuple(bundle.items()) for bundle in group["bundles"].values())
    return [RoomRequest("worker", count, dict(each)) for each, count in counts.items()]


# --- Room that the dead hold ---


def free_left_room(dead_actor: str | None = None) -> int:
    """Give back the room that dead actors of this job hold or wait for; return the number of placement groups.

    `dead_actor` is the hexadecimal id of one that the caller knows to be dead: Ray notes a death a moment after it
    tells it.

    A placement group lives as long as its creator *or* the job. That of a controller of Ray Train that died would keep
    room from all that comes after it: Ray Train's own cleaner asks the dashboard, which a local Ray has not, and knows
    of no group that still waits.
    """
    job_id = bytes.fromhex(ray.get_runtime_context().get_job_id())
    left = []
    for encoded in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(encoded)
        # What the job itself asked for has no actor as its creator.
        creator = ActorID(group.creator_actor_id)
        if creator.is_nil() or group.creator_job_id != job_id or group.state == PlacementGroupTableData.REMOVED:
            continue
        if group.creator_actor_dead or creator.hex() == dead_actor:
            left.append(PlacementGroup(PlacementGroupID(group.placement_group_id)))

    for group in left:
        _remove_group(group)
    return len(left)
