"""The optimal label pool that all training workers share: its shards, and one worker's client to them.

A shard that dies comes back and restores its labels from the last snapshot; what workers made since, they still hold
and hand over again. Meanwhile training goes on: a label that cannot be had is taken from the teacher.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from corun_ray.core.labels import Label
from corun_ray.service import snapshots
from corun_ray.service.poolindex import PoolCounters
from corun_ray.service.shard import PartOfSave, PoolShard, Reply, shard_of
from corun_ray.service.storage import Location

READ_TIMEOUT_S = 20.0
"""A shard that does not answer for so long counts as away, and its labels as missing, until it answers again."""
RETURN_TIMEOUT_S = 300.0
"""For so long a checkpoint waits for a shard that is away."""
PING_S = 5.0
PAUSE_S = 0.2
MIB = 2**20
ANY_NODE: list[dict[str, Any]] = [{"label_selector": {}}]
Call = Callable[[Any], ray.ObjectRef]


class PoolError(Exception):
    """The pool cannot be saved; the message is one line."""


class ShardLink:
    """One worker's view of one shard: whether it answers, and the labels that only this worker may still hold."""

    def __init__(self, actor: Any, number: int, generation: int) -> None:
        self.actor, self.number, self.generation = actor, number, generation
        self._incarnation: int | None = None
        self._probe: ray.ObjectRef | None = None
        """A ping under way to a shard that did not answer; None while it does."""
        self._held: dict[str, Label] = {}
        """Labels offered since the last snapshot."""

    def read(self, keys: Sequence[str]) -> ray.ObjectRef | None:
        """Starts reading; None if the shard is away."""
        return self.actor.read.remote(list(keys)) if self._answers() else None

    def offer(self, labels: Sequence[Label]) -> None:
        """Hands labels over without waiting, and holds them until storage has them."""
        self._held |= {label.key: label for label in labels}
        if self._answers():
            self.actor.offer.remote(self.generation, list(labels))

    def reply(self, ref: ray.ObjectRef | None) -> list[ray.ObjectRef | None] | None:
        """What a read gave; None if the shard turned out to be away."""
        if ref is None:
            return None
        try:
            reply: Reply = ray.get(ref, timeout=READ_TIMEOUT_S)
        except (RayActorError, GetTimeoutError):
            self._lose()
            return None
        self._hear(reply.incarnation, reply.saved_step)
        return reply.labels

    def settle(self, deadline_s: float) -> None:
        """Waits until everything offered so far has been decided, if need be until the shard is back.

        Raises `PoolError` past the deadline (of `time.monotonic`).
        """
        while time.monotonic() < deadline_s:
            try:
                heard = ray.get(self.actor.ping.remote(), timeout=PING_S)
                if not self._hear(*heard):
                    self._probe = None
                    return
            except (RayActorError, GetTimeoutError):
                self._lose()
            time.sleep(PAUSE_S)
        raise PoolError(f"label pool: shard {self.number} has not come back in {RETURN_TIMEOUT_S:.0f} s")

    def forget(self, keys: Sequence[str]) -> None:
        """Tells the shard that the labels of `keys` could not be had."""
        self.actor.forget.remote(self.generation, list(keys))

    def _answers(self) -> bool:
        if self._probe is None:
            return True
        if ray.wait([self._probe], timeout=0)[0]:
            try:
                incarnation, saved_step = ray.get(self._probe)
                if incarnation is not None:
                    self._probe = None
                    self._hear(incarnation, saved_step)
                    return True
            except RayActorError:
                pass
            self._probe = self.actor.ping.remote()
        return False

    def _lose(self) -> None:
        self._probe = self.actor.ping.remote()

    def _hear(self, incarnation: int | None, saved_step: int) -> bool:
        """Takes note of how the shard stands; says whether it must be asked again.

        A shard that has restarted is handed what it cannot have from storage.
        """
        if incarnation is None:
            self._probe = self.actor.ping.remote()
            return True
        self._held = {key: label for key, label in self._held.items() if label.step >= saved_step}
        is_new = self._incarnation not in (None, incarnation)
        self._incarnation = incarnation
        if is_new and self._held:
            self.actor.offer.remote(self.generation, list(self._held.values()))
        return is_new


class PendingRead:
    """A read under way; see `core.labels.PendingLabels`."""

    def __init__(self, keys: Sequence[str], reads: Iterable[tuple[ShardLink, list[str], ray.ObjectRef | None]]) -> None:
        self._keys = keys
        self._reads = list(reads)

    def result(self) -> list[Label | None]:
        """Waits for the labels; arrays are read in place on the node that holds them."""
        refs: dict[str, tuple[ShardLink, ray.ObjectRef]] = {}
        for link, keys, read in self._reads:
            for key, ref in zip(keys, link.reply(read) or (), strict=False):
                if ref is not None:
                    refs[key] = (link, ref)
        labels = self._labels(refs)
        return [labels.get(key) for key in self._keys]

    def _labels(self, refs: dict[str, tuple[ShardLink, ray.ObjectRef]]) -> dict[str, Label]:
        try:
            found = ray.get([ref for _, ref in refs.values()], timeout=READ_TIMEOUT_S)
            return dict(zip(refs, found, strict=True))
        except RayError:
            return {key: label for key, (link, ref) in refs.items() if (label := self._label(link, key, ref))}

    def _label(self, link: ShardLink, key: str, ref: ray.ObjectRef) -> Label | None:
        """One label where not all could be had: its shard may have died since, or its segment be out of reach."""
        try:
            return ray.get(ref, timeout=PING_S)
        except GetTimeoutError:
            return None  # still on its way
        except RayError:
            link.forget([key])
            return None


class PoolClient:
    """One worker's view of the shared pool; a `core.labels.LabelPool`.

    A step costs one round trip to each shard that it touches. A worker's calls reach a shard in the order in which
    it made them: what it offered, it reads back.
    """

    def __init__(self, shards: Sequence[Any], generation: int) -> None:
        self._links = [ShardLink(actor, number, generation) for number, actor in enumerate(shards)]

    def prefetch(self, keys: Sequence[str]) -> PendingRead:
        """Starts reading the labels of `keys`."""
        by_link = self._by_link((key, key) for key in keys)
        return PendingRead(keys, [(link, wanted, link.read(wanted)) for link, wanted in by_link])

    def offer(self, labels: Sequence[Label]) -> None:
        """Hands labels over without waiting; the shards compare each again."""
        for link, some in self._by_link((label.key, label) for label in labels):
            link.offer(some)

    def settle(self) -> None:
        """Waits until everything offered by this worker has been decided.

        Raises `PoolError` if a shard is away for more than `RETURN_TIMEOUT_S`.
        """
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        for link in self._links:
            link.settle(deadline_s)

    def _by_link(self, items: Iterable[tuple[str, Any]]) -> list[tuple[ShardLink, list[Any]]]:
        found = defaultdict(list)
        for key, item in items:
            found[shard_of(key, len(self._links))].append(item)
        return [(self._links[number], some) for number, some in found.items()]


class PoolKeeper:
    """What one worker, of rank 0, does with the whole pool: restore it, save it, sweep up."""

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
                part = _insist(self._shards[number], self._freeze, number, deadline_s)
        return part

    def _ask_all(self, call: Call) -> list[Any]:
        """Asks all shards at once and, until they are back, those again that do not answer."""
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        asked = [call(shard) for shard in self._shards]
        return [
            _insist(shard, call, number, deadline_s, first=ref)
            for number, (shard, ref) in enumerate(zip(self._shards, asked, strict=True))
        ]


def _insist(shard: Any, call: Call, number: int, deadline_s: float, first: ray.ObjectRef | None = None) -> Any:
    """A shard's answer, asked for until it comes; raises what the shard raises, and `PoolError` past the deadline."""
    ref = call(shard) if first is None else first
    while True:
        try:
            return ray.get(ref, timeout=max(0.0, deadline_s - time.monotonic()))
        except RayTaskError as error:
            raise error.cause from None
        except (RayActorError, GetTimeoutError):
            if time.monotonic() > deadline_s:
                raise PoolError(f"label pool: shard {number} has not come back in {RETURN_TIMEOUT_S:.0f} s") from None
        time.sleep(PAUSE_S)
        ref = call(shard)


def start_pool(num_shards: int, pool: Location, memory_mib: int | None = None) -> list[Any]:
    """The shards as actors, spread over the nodes, alive as long as the driver holds the handles."""
    budget_bytes = math.inf if memory_mib is None else memory_mib * MIB / num_shards
    nodes = _nodes_in_turn()
    shards = []
    for number in range(num_shards):
        # Ray's own spreading goes by resources, of which a shard needs none. Once its node is gone, any will do.
        node = {"ray.io/node-id": nodes[number % len(nodes)]}
        shard = ray.remote(num_cpus=0, max_restarts=-1, label_selector=node, fallback_strategy=ANY_NODE)(PoolShard)
        shards.append(shard.remote(number, num_shards, pool.uri, budget_bytes))
    return shards


def _nodes_in_turn() -> list[str]:
    """The ids of the nodes, this one last: what is lost with it costs the run anyway."""
    here = ray.get_runtime_context().get_node_id()
    return sorted((node["NodeID"] for node in ray.nodes() if node["Alive"]), key=lambda node: (node == here, node))


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
