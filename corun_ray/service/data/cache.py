"""`data.cache_mib`: decoded images and depth maps in Ray's object store, so that a node decodes each only once.

Each node has an actor that puts what decoding tasks offer it into the object store and so owns it: it outlives the
task's process, and every task on the node reads it in place. What is in stays in. An epoch takes each image once, in
another order than the last, so what was not used for longest is what comes soonest: with room for half of the images,
a cache that drops those would serve 15 % of the reads, one that drops nothing serves half.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from corun_ray.core.data.depth import DepthMap
from corun_ray.core.timing import phase

T = TypeVar("T", np.ndarray, DepthMap)

MIB = 2**20
STORE_SHARE = 0.5
"""Of a node's object store, at most; the rest is for batches and labels, which Ray would else write to disk."""
ANSWER_TIMEOUT_S = 1.0
"""For so long a task waits to hear what the cache holds; then it goes on with what it knows of."""
READ_TIMEOUT_S = 20.0
"""Something that Ray has not found by then counts as lost."""
OFFERS_AT_ONCE = 2
"""That a process has under way; what it decodes meanwhile is offered in another epoch."""


class CacheUpdate(NamedTuple):
    """What a node's cache has taken since the last look."""

    entries: list[tuple[Hashable, ray.ObjectRef]]
    has_room: bool


class NodeCache:
    """One node's decoded images, up to `budget_bytes` of them, as an actor."""

    def __init__(self, budget_bytes: int) -> None:
        self._left_bytes = budget_bytes
        self._entries: dict[Hashable, ray.ObjectRef] = {}
        self._has_room = True

    def offer(self, key: Hashable, value: np.ndarray | DepthMap) -> None:
        """Keeps what is new; the first that does not fit is the end of taking."""
        if key in self._entries or not self._has_room:
            return
        size_bytes = value.pixels.nbytes if isinstance(value, DepthMap) else value.nbytes
        self._has_room = size_bytes <= self._left_bytes
        if self._has_room:
            self._left_bytes -= size_bytes
            self._entries[key] = ray.put(value)

    def since(self, count: int) -> CacheUpdate:
        """All but the first `count` entries, in the order in which they came."""
        return CacheUpdate([*self._entries.items()][count:], self._has_room)


class CacheKeeper:
    """The caches of a job's nodes, as an actor: each is made when the first task of its node asks for it."""

    def __init__(self, cache_mib: int) -> None:
        self._cache_bytes = cache_mib * MIB
        self._caches: dict[str, Any] = {}

    def on_node(self, node_id: str, lost: Any = None) -> Any:
        """The cache of a node: a new one if `lost`, which has died, is still the last that is known of."""
        if node_id not in self._caches or self._caches[node_id] == lost:
            (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
            make: Any = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node_id})(NodeCache)
            self._caches[node_id] = make.remote(min(self._cache_bytes, most_bytes(node)))
        return self._caches[node_id]


def most_bytes(node: Mapping[str, Any]) -> int:
    """What a node of `ray.nodes()` can give to a cache."""
    return int(STORE_SHARE * node["Resources"].get("object_store_memory", 0))


def start_cache(cache_mib: int, board: Any) -> Any:
    """The keeper on the driver's node; None for a job without a cache. All caches go when it is killed.

    Posts a note where the nodes of now cannot hold so much.
    """
    if cache_mib == 0:
        return None
    least_mib = min(most_bytes(node) for node in ray.nodes() if node["Alive"]) // MIB
    if least_mib < cache_mib:
        board.post_note.remote(
            f"data.cache_mib: {least_mib} MiB on some node, half of its object store (ray start --object-store-memory)"
        )
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, max_restarts=-1, label_selector=here)(CacheKeeper).remote(cache_mib)


class Decoded:
    """One process's view of its node's cache: what a `SampleMaker` decodes through. Not for several threads."""

    def __init__(self, keeper: Any) -> None:
        self._keeper, self._node_id = keeper, ray.get_runtime_context().get_node_id()
        self._cache: Any = None
        self._lost: Any = None
        self._known: dict[Hashable, ray.ObjectRef] = {}
        self._num_heard = 0
        self._has_room = True
        self._under_way: list[ray.ObjectRef] = []

    def refresh(self) -> None:
        """Hears what other tasks have added; for each few samples, since it is a round trip."""
        if self._cache is not None and not self._has_room:
            return
        try:
            if self._cache is None:
                self._cache = ray.get(self._keeper.on_node.remote(self._node_id, self._lost), timeout=ANSWER_TIMEOUT_S)
            news: CacheUpdate = ray.get(self._cache.since.remote(self._num_heard), timeout=ANSWER_TIMEOUT_S)
        except GetTimeoutError:
            return
        except RayActorError:
            self._forget()
            return
        self._known.update(news.entries)
        self._num_heard += len(news.entries)
        self._has_room = news.has_room

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What the cache has of `key`, not to be written to, else what `make` makes, which is offered to it."""
        if key in self._known:
            try:
                with phase("read"):
                    return cast(T, ray.get(self._known[key], timeout=READ_TIMEOUT_S))
            except (ObjectLostError, GetTimeoutError):
                self._forget()
        value = make()
        if self._cache is not None and self._has_room:
            self._offer(key, value)
        return value

    def _offer(self, key: Hashable, value: np.ndarray | DepthMap) -> None:
        if self._under_way:
            self._under_way = ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0)[1]
        if len(self._under_way) < OFFERS_AT_ONCE:
            self._under_way.append(self._cache.offer.remote(key, value))

    def _forget(self) -> None:
        """The cache has died, and what it owned is lost: the next refresh asks for another."""
        self._lost, self._cache = self._cache or self._lost, None
        self._known, self._num_heard, self._has_room = {}, 0, True


@lru_cache(maxsize=2)
def decoded_of(keeper: Any) -> Decoded:
    """The view of a process, which its tasks share."""
    return Decoded(keeper)
