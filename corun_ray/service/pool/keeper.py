"""What one worker, of rank 0, does with the whole label pool: restore it, save it, sweep up."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import MIB, PING_S, RETURN_TIMEOUT_S, Call, PoolError, insist
from corun_ray.service.pool.index import PoolCounters
from corun_ray.service.pool.shard import PartOfSave, PoolShard
from corun_ray.service.storage import Location
from corun_ray.service.telemetry.prometheus import NO_JOB


class PoolKeeper:
    """The pool as a whole, in the hands of one worker. `finish` may run in another thread than the rest."""

    def __init__(self, shards: Sequence[Any], pool: Location) -> None:
        self._shards, self._pool = shards, pool
        self._generation = 0

    def restore(self, snapshot: str | None) -> int:
        """Makes the pool what a snapshot (None: nothing) holds; returns the generation that offers must name.

        Raises `StorageError` and `PoolError`.
        """
        # The step may repeat (a crash before the first checkpoint), a start of the workers does not.
        self._generation = time.time_ns()
        snapshots.write_current(self._pool, snapshots.Current(generation=self._generation, snapshot=snapshot))
        self._ask_all(lambda shard: shard.restore.remote(snapshot, self._generation))
        return self._generation

    def freeze(self) -> list[PartOfSave]:
        """Fixes the content of all shards as of now; the writing goes on beside the training. Raises `PoolError`."""
        return self._ask_all(self._freeze)

    def finish(self, step: int, parts: Sequence[PartOfSave]) -> None:
        """Waits for what `freeze` has started and makes the snapshot of `step` visible.

        A shard that died meanwhile is saved as it stands once it is back. Raises `StorageError`, and `PoolError`
        where it does not come back.
        """
        if snapshots.read_current(self._pool).generation != self._generation:
            raise PoolError("label pool: another start of the workers has taken over")
        whole = [self._written(number, part) for number, part in enumerate(parts)]
        counters = [part.counters for part in whole]
        labels = sum(shard.labels for shard in counters)
        snapshots.write(self._pool, step, labels, [[*part.kept, *part.new] for part in whole], counters)
        current = snapshots.Current(generation=self._generation, snapshot=snapshots.name_of(step))
        snapshots.write_current(self._pool, current)
        for shard in self._shards:
            shard.confirm.remote(self._generation, step)

    def sweep(self, keep_steps: Iterable[int]) -> None:
        """Deletes snapshots other than those of `keep_steps`, and what only they held.

        Raises `StorageError` and `PoolError`.
        """

        def in_use() -> Iterable[str]:
            for names in self._ask_all(lambda shard: shard.segment_names.remote(self._generation)):
                yield from names

        snapshots.sweep(self._pool, {snapshots.name_of(step) for step in keep_steps}, in_use())

    def _freeze(self, shard: Any) -> ray.ObjectRef:
        return shard.freeze.remote(self._generation)

    def _written(self, number: int, part: PartOfSave) -> PartOfSave:
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        while part.written is not None:
            try:
                ray.get(part.written)
                break
            except RayTaskError as error:
                raise error.cause from None
            except RayError:  # what was frozen has died with its shard
                part = insist(self._shards[number], self._freeze, number, deadline_s)
        return part

    def _ask_all(self, call: Call) -> list[Any]:
        """Asks all shards at once and, until they are back, those again that do not answer."""
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        asked = [call(shard) for shard in self._shards]
        return [
            insist(shard, call, number, deadline_s, first=ref)
            for number, (shard, ref) in enumerate(zip(self._shards, asked, strict=True))
        ]


POOL_LABEL = ("corun-role", "pool")
"""Of nodes that are kept for the label pool: `ray start --labels=corun-role=pool`."""


ANY_NODE: list[dict[str, Any]] = [{"label_selector": {}}]


def start_pool(
    num_shards: int, pool: Location, memory_mib: int | None = None, labels: Mapping[str, str] = NO_JOB
) -> list[Any]:
    """The shards as actors, alive as long as the driver holds the handles, spread over the nodes meant for them.

    `labels` are those of the job's metrics.
    """
    budget_bytes = math.inf if memory_mib is None else memory_mib * MIB / num_shards
    nodes = nodes_in_turn(ray.nodes(), ray.get_runtime_context().get_node_id())
    shards = []
    for number in range(num_shards):
        # Ray's own spreading goes by resources, of which a shard needs none. Once its node is gone, any will do.
        node = {"ray.io/node-id": nodes[number % len(nodes)]}
        shard = ray.remote(num_cpus=0, max_restarts=-1, label_selector=node, fallback_strategy=ANY_NODE)(PoolShard)
        shards.append(shard.remote(number, num_shards, pool.uri, budget_bytes, labels))
    return shards


def nodes_in_turn(nodes: Iterable[Mapping[str, Any]], here: str) -> list[str]:
    """The ids of the nodes for shards, of Ray's descriptions: those labelled `POOL_LABEL`, else all that are alive.

    The driver's own, `here`, comes last: what is lost with it costs the run anyway.
    """
    alive = [node for node in nodes if node["Alive"]]
    name, value = POOL_LABEL
    meant = [node for node in alive if node.get("Labels", {}).get(name) == value]
    return sorted((node["NodeID"] for node in meant or alive), key=lambda node: (node == here, node))


def count(shards: Sequence[Any]) -> dict[str, float]:
    """What there is to log: the totals of all shards that answer, and, where there are several, of each."""
    asked = [shard.counters.remote() for shard in shards]
    metrics: dict[str, float] = {}
    total = PoolCounters()
    for number, ref in enumerate(asked):
        try:
            counters = ray.get(ref, timeout=PING_S)
        except (RayActorError, GetTimeoutError):
            continue  # it is away: what it counts is missing from this line alone
        total += counters
        if len(shards) > 1:
            metrics |= {f"shard_{number}/{name}": value for name, value in _plain(counters).items()}
    return metrics | _plain(total)


def _plain(counters: PoolCounters) -> dict[str, float]:
    names = ("labels", "offers", "wins", "reads", "hits", "loads", "evictions")
    return {name: getattr(counters, name) for name in names} | {"memory_mib": counters.resident_bytes / MIB}
