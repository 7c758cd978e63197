"""`data.cache_mib`: decoded images and depth maps in Ray's object store, so that a node decodes each only once.

Each node has one actor that puts the images offered by decoding tasks into the object store, and so owns them: they
outlive the task's process, and every task on the node reads them in place.

No eviction. An epoch takes each image once, in another order than the epoch before, so the least recently used image
is the one that comes next: with room for half of the images, LRU would serve 15 % of the reads, no eviction half.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from corun_ray.config.jobs import ColabatorJob, Job, TrainingJob, TuneJob
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.timing import phase

NoticeBoard = ActorProxy[Any]
"""Handle of the run's notice board, `service.train.board.BoardState`: a class that this room may not import."""

Decoded = TypeVar("Decoded", np.ndarray, DepthMap)

MIB = 2**20
STORE_SHARE = 0.5
"""Largest share of a node's object store. Batches and labels need the rest; Ray would write them to disk."""
ANSWER_TIMEOUT_S = 1.0
"""How long a task waits to hear what the cache holds, before it makes do with what it knows."""
READ_TIMEOUT_S = 20.0
"""An object that Ray has not found by then counts as lost."""
MAX_PENDING_OFFERS = 2
"""Offers of a process that may be under way. Images decoded meanwhile are offered in another epoch."""


class CacheUpdate(NamedTuple):
    """What a node's cache has taken since the last look."""

    entries: list[tuple[Hashable, ray.ObjectRef]]
    has_room: bool


class CacheState(NamedTuple):
    """What one cache, or all those of a keeper, hold."""

    num_entries: int
    has_room: bool


class NodeCache:
    """Actor that holds the decoded images of one node, up to `budget_bytes`."""

    def __init__(self, budget_bytes: int) -> None:
        self._left_bytes = budget_bytes
        self._entries: dict[Hashable, ray.ObjectRef] = {}
        self._has_room = True

    @ray.method
    def offer(self, key: Hashable, value: np.ndarray | DepthMap) -> None:
        """Keep a new image.

        After the first that does not fit, no more are taken.
        """
        if key in self._entries or not self._has_room:
            return

        size_bytes = value.pixels.nbytes if isinstance(value, DepthMap) else value.nbytes
        self._has_room = size_bytes <= self._left_bytes
        if self._has_room:
            self._left_bytes -= size_bytes
            self._entries[key] = ray.put(value)

    @ray.method
    def list_since(self, count: int) -> CacheUpdate:
        """Return all but the first `count` entries, in order."""
        entries = list(self._entries.items())
        return CacheUpdate(entries[count:], self._has_room)

    @ray.method
    def get_state(self) -> CacheState:
        """Return how much the cache holds."""
        return CacheState(len(self._entries), self._has_room)


class CacheKeeper:
    """Actor that knows the caches of a job's nodes and starts each when a task of its node first asks for it."""

    def __init__(self, cache_mib: int) -> None:
        self._cache_bytes = cache_mib * MIB
        self._caches: dict[str, ActorProxy[NodeCache]] = {}

    @ray.method
    def get_cache(self, node_id: str, lost: ActorProxy[NodeCache] | None) -> ActorProxy[NodeCache]:
        """Return the cache of a node.

        `lost` is a cache that the caller found dead: where it is still the last one known, a new one is started.
        """
        if node_id not in self._caches or self._caches[node_id] == lost:
            (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
            budget_bytes = min(self._cache_bytes, compute_max_bytes(node))
            on_node = {"ray.io/node-id": node_id}
            self._caches[node_id] = (
                ray.remote(NodeCache).options(num_cpus=0, label_selector=on_node).remote(budget_bytes)
            )

        return self._caches[node_id]

    @ray.method
    def get_state(self) -> CacheState:
        """Return what all nodes' caches hold; a cache that has died holds nothing."""
        num_entries, has_room = 0, True
        for cache in self._caches.values():
            with suppress(RayActorError):
                state = ray.get(cache.get_state.remote())
                num_entries += state.num_entries
                has_room &= state.has_room
        return CacheState(num_entries, has_room)


def compute_max_bytes(node: Mapping[str, Any]) -> int:
    """Return the bytes that a node can give to a cache.

    `node` is an entry of `ray.nodes()`.
    """
    return int(STORE_SHARE * node["Resources"].get("object_store_memory", 0))


def start_cache(cache_mib: int, board: NoticeBoard) -> ActorProxy[CacheKeeper] | None:
    """Start the keeper of a job's caches.

    It runs on the driver's node. Returns None for a job without a cache.

    Posts a note where a node of the present cluster cannot hold that much. All caches end when the keeper is killed.
    """
    if cache_mib == 0:
        return None

    # Tell of the node with the least room.
    least_mib = min(compute_max_bytes(node) for node in ray.nodes() if node["Alive"]) // MIB
    if least_mib < cache_mib:
        board.post_note.remote(
            f"data.cache_mib: only {least_mib} MiB fit on some node, half of its object store "
            "(ray start --object-store-memory)"
        )

    on_this_node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    keeper = ray.remote(CacheKeeper).options(num_cpus=0, max_restarts=-1, label_selector=on_this_node)
    return keeper.remote(cache_mib)


class CacheView:
    """One process's view of its node's cache, through which a `SampleMaker` decodes. Not thread-safe."""

    def __init__(self, keeper: ActorProxy[CacheKeeper]) -> None:
        self._keeper = keeper
        self._node_id = ray.get_runtime_context().get_node_id()
        self._cache: ActorProxy[NodeCache] | None = None
        self._lost: ActorProxy[NodeCache] | None = None
        self._known: dict[Hashable, ray.ObjectRef] = {}
        self._num_heard = 0
        self._has_room = True
        self._pending_offers: list[ray.ObjectRef] = []

    def refresh(self) -> None:
        """Fetch what other tasks have added.

        This is a round trip, so call it once for many samples.
        """
        # A full cache changes no more.
        if self._cache is not None and not self._has_room:
            return

        try:
            if self._cache is None:
                self._cache = ray.get(
                    self._keeper.get_cache.remote(self._node_id, self._lost), timeout=ANSWER_TIMEOUT_S
                )

            update = ray.get(self._cache.list_since.remote(self._num_heard), timeout=ANSWER_TIMEOUT_S)
        except GetTimeoutError:
            return
        except RayActorError:
            self._forget()
            return

        self._known.update(update.entries)
        self._num_heard += len(update.entries)
        self._has_room = update.has_room

    def get(self, key: Hashable, decode: Callable[[], Decoded]) -> Decoded:
        """Return the cached value of `key`, or decode it.

        A decoded value is offered to the cache.

        A cached value is shared memory: do not write to it.
        """
        if key in self._known:
            try:
                with phase("read"):
                    return cast(Decoded, ray.get(self._known[key], timeout=READ_TIMEOUT_S))
            except (ObjectLostError, GetTimeoutError):
                self._forget()

        value = decode()
        if self._cache is not None and self._has_room:
            self._offer(self._cache, key, value)

        return value

    def _offer(self, cache: ActorProxy[NodeCache], key: Hashable, value: np.ndarray | DepthMap) -> None:
        """Offer a decoded image, unless enough offers are under way."""
        # Drop the offers that are done.
        if self._pending_offers:
            pending = self._pending_offers
            self._pending_offers = ray.wait(pending, num_returns=len(pending), timeout=0)[1]

        if len(self._pending_offers) < MAX_PENDING_OFFERS:
            self._pending_offers.append(cache.offer.remote(key, value))

    def _forget(self) -> None:
        """Forget a cache that has died.

        Its objects are lost, and the next refresh asks for another.
        """
        if self._cache is not None:
            self._lost = self._cache
        self._cache = None
        self._known = {}
        self._num_heard = 0
        self._has_room = True


@lru_cache(maxsize=2)
def get_cache_view(keeper: ActorProxy[CacheKeeper]) -> CacheView:
    """Return the view that all tasks of this process share."""
    return CacheView(keeper)


# --- The jobs of one file ---


class JobCaches:
    """The caches of the training jobs of a file, which run one after the other.

    A job's cache stays for the next job with a cache where that job reads the same data. Otherwise its memory is given
    back when the job ends.
    """

    def __init__(self, jobs: Sequence[Job] = ()) -> None:
        """Begin; `jobs` are those of the file, in their order."""
        self._ahead = [job for job in jobs if isinstance(job, TrainingJob) and job.data.cache_mib]
        self._keeper: ActorProxy[CacheKeeper] | None = None
        self._cache_mib = 0
        self._held: set[tuple[str, str]] = set()
        """Data roots, each with its version, of whose files the cache may hold any."""

    def start(
        self, job: TrainingJob, versions: Mapping[str, str], board: NoticeBoard
    ) -> ActorProxy[CacheKeeper] | None:
        """Return the keeper of a job's caches: that of the job before, or a new one; None for a job without a cache.

        `versions` are those of the job's manifest. Posts a note as `start_cache` does, and one of what is held already.
        """
        # The jobs before this one are over, or were skipped.
        names = [other.name for other in self._ahead]
        if job.name in names:
            del self._ahead[: names.index(job.name) + 1]
        if job.data.cache_mib == 0:
            return None

        wanted = set(versions.items())
        num_held = self._count_held(job.data.cache_mib, wanted)
        if num_held:
            board.post_note.remote(f"data.cache_mib: {num_held} decoded images and maps of the job before are at hand")
        else:
            self.close()
            self._keeper = start_cache(job.data.cache_mib, board)
        self._cache_mib, self._held = job.data.cache_mib, self._held | wanted
        return self._keeper

    def finish_job(self) -> None:
        """End the cache, unless the next job that has one may use what it holds."""
        later = self._ahead[0] if self._ahead else None
        is_shared = later is not None and not isinstance(later, TuneJob) and later.data.cache_mib == self._cache_mib
        roots = {root for root, _ in self._held}
        if later is None or not is_shared or not roots & set(list_roots(later)):
            self.close()

    def close(self) -> None:
        """Give all memory back."""
        # Idle processes of Ray keep a handle to the cache, which would stay alive otherwise.
        if self._keeper is not None:
            ray.kill(cast(ActorHandle, self._keeper))
        self._keeper, self._held = None, set()

    def _count_held(self, cache_mib: int, wanted: set[tuple[str, str]]) -> int:
        """Count what a cache of this size holds for a job that reads these roots; 0 where it must begin anew.

        What the job does not read must take no room from what it reads.
        """
        if self._keeper is None or self._cache_mib != cache_mib:
            return 0
        try:
            state = ray.get(self._keeper.get_state.remote(), timeout=READ_TIMEOUT_S)
        except (GetTimeoutError, RayActorError):
            return 0
        serves = self._held <= wanted or (wanted <= self._held and state.has_room)
        return state.num_entries if serves else 0


def list_roots(job: TrainingJob) -> list[str]:
    """List the data roots of which a training caches images and depth maps."""
    data = job.data
    roots = [data.clear, data.depth]
    if data.paired is not None:
        roots += [data.paired.hazy, data.paired.clear]
    if isinstance(job, ColabatorJob):
        roots.append(job.data.hazy)
    return [root for root in roots if root is not None]
