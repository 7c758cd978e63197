"""The label pool as a whole: its start by the driver, and restoring, saving and sweeping by the worker of rank 0."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.actor import ActorProxy
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from corun_ray.core.training.labels import Scores
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import PAUSE_S, PING_TIMEOUT_S, RETURN_TIMEOUT_S, PoolError
from corun_ray.service.pool.index import PoolCounters, Rejections
from corun_ray.service.pool.review import find_rejections, read_decisions
from corun_ray.service.pool.shard import PoolShard, ShardSave
from corun_ray.service.storage import Location
from corun_ray.service.telemetry.prometheus import NO_JOB

MIB = 2**20
POOL_LABEL = ("corun-role", "pool")
"""Label of the nodes reserved for the label pool: `ray start --labels=corun-role=pool`."""
ANY_NODE: list[dict[str, Any]] = [{"label_selector": {}}]
LOGGED_COUNTERS = ("labels", "offers", "wins", "reads", "hits", "loads", "evictions")

T = TypeVar("T")


class PoolKeeper:
    """The whole pool in the hands of one worker. `finish` and `sweep` may run in another thread than the rest."""

    def __init__(self, shards: Sequence[ActorProxy[PoolShard]], pool: Location) -> None:
        self._shards, self._pool = shards, pool
        self._generation = 0
        self.num_rejected = 0
        """Labels that left the pool when it was restored, since a person has rejected them."""

    def restore(self, snapshot: str | None) -> int:
        """Replace the pool's content by that of a snapshot.

        Labels rejected in review leave the pool. None stands for an empty pool. Returns the generation that offers must
        name.

        Raises `StorageError` and `PoolError`.
        """
        # Number this start of the workers by the clock. The step would not do: it repeats if the workers crash before
        # the first checkpoint.
        self._generation = time.time_ns()

        # Read the review here, once for all shards: a decision made from now on waits for the next restore.
        rejections = find_rejections(read_decisions(self._pool))

        # First tell where the pool is to stand, so that a shard that dies from now on restores the same.
        self._write_current(snapshot, rejections)
        left = self._call_all(lambda shard: shard.restore.remote(snapshot, self._generation, rejections))
        self.num_rejected = sum(left)
        return self._generation

    def freeze(self) -> list[ShardSave]:
        """Fix the content of all shards as of now.

        The shards write it while training continues.

        Raises `PoolError`.
        """
        return self._call_all(self._freeze_shard)

    def finish(self, step: int, parts: Sequence[ShardSave]) -> None:
        """Complete the snapshot of `step` and make it visible.

        This waits for the writing that `freeze` has started. A shard that died meanwhile is saved as it stands once it
        is back.

        Raises `StorageError`, and `PoolError` where a shard does not come back.
        """
        # A worker of an earlier generation must not replace what the present one restored.
        if snapshots.read_current(self._pool).generation != self._generation:
            raise PoolError("label pool: another start of the workers has taken over")

        # Wait for the segments of all shards: a snapshot may name written segments alone.
        segments_by_shard, counters = [], []
        rejections: Rejections = {}
        labels = 0
        for number, part in enumerate(parts):
            written = self._await_segments(number, part)
            segments_by_shard.append([*written.kept, *written.new])
            counters.append(written.counters)
            rejections |= written.rejections
            labels += written.counters.labels

        # Write the snapshot, which makes it visible.
        snapshots.write(self._pool, step, labels, segments_by_shard, counters, rejections)

        # From now on, a shard that dies restores this snapshot. It names the rejected labels itself.
        self._write_current(snapshots.format_name(step), {})

        # Only then may workers let go of the labels that it holds.
        for shard in self._shards:
            shard.confirm.remote(self._generation, step)

    def sweep(self, keep_steps: Iterable[int]) -> None:
        """Delete the snapshots other than those of `keep_steps`.

        The segments that only they named go as well.

        Raises `StorageError` and `PoolError`.
        """

        # A generator: the shards are asked when it is consumed, after the files have been listed.
        def find_segments_in_use() -> Iterable[str]:
            for names in self._call_all(lambda shard: shard.get_segment_names.remote(self._generation)):
                yield from names

        keep = {snapshots.format_name(step) for step in keep_steps}
        snapshots.sweep(self._pool, keep, find_segments_in_use())

    def _write_current(self, snapshot: str | None, rejections: Mapping[str, Scores]) -> None:
        """Write what a shard that dies from now on restores."""
        rejected = snapshots.make_rejection_records(rejections)
        current = snapshots.Current(generation=self._generation, snapshot=snapshot, rejected=rejected)
        snapshots.write_current(self._pool, current)

    def _freeze_shard(self, shard: ActorProxy[PoolShard]) -> "ray.ObjectRef[ShardSave]":
        return shard.freeze.remote(self._generation)

    def _await_segments(self, number: int, part: ShardSave) -> ShardSave:
        """Wait until a shard's new segments are written.

        Returns the shard's part in the snapshot.
        """
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        while part.written is not None:
            try:
                ray.get(part.written)
                break
            except RayTaskError as error:
                raise error.cause from None
            except RayError:
                # The shard has died, and with it the labels of the frozen part: freeze it again once it is back.
                shard = self._shards[number]
                part = _call_until_answered(shard, self._freeze_shard, number, deadline_s)
        return part

    def _call_all(self, call: "Callable[[ActorProxy[PoolShard]], ray.ObjectRef[T]]") -> list[T]:
        """Call all shards at once; return their answers.

        Shards that do not answer are called again.
        """
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        refs = [call(shard) for shard in self._shards]

        answers = []
        for number, (shard, ref) in enumerate(zip(self._shards, refs, strict=True)):
            answers.append(_call_until_answered(shard, call, number, deadline_s, ref))
        return answers


def _call_until_answered(
    shard: ActorProxy[PoolShard],
    call: "Callable[[ActorProxy[PoolShard]], ray.ObjectRef[T]]",
    number: int,
    deadline_s: float,
    ref: "ray.ObjectRef[T] | None" = None,
) -> T:
    """Return a shard's answer; call again while it is away.

    `ref` is a call made already.

    Raises the errors of the shard, and `PoolError` past the deadline (of `time.monotonic`).
    """
    ref = call(shard) if ref is None else ref
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


# --- Starting the shards ---


def start_pool(
    num_shards: int, pool: Location, memory_mib: int | None = None, labels: Mapping[str, str] = NO_JOB
) -> list[ActorProxy[PoolShard]]:
    """Start the shards as actors.

    They are spread over the nodes meant for them. They live as long as the driver holds the handles. `memory_mib`
    bounds the labels in memory of all shards together; `labels` are those of the job's metrics.
    """
    budget_bytes = math.inf if memory_mib is None else memory_mib * MIB / num_shards
    nodes = order_nodes(ray.nodes(), ray.get_runtime_context().get_node_id())

    shards = []
    for number in range(num_shards):
        # Choose the node here: Ray spreads actors by resources, and a shard needs none. Once the node is gone, a
        # restarted shard may run on any other.
        node = {"ray.io/node-id": nodes[number % len(nodes)]}
        shard = ray.remote(num_cpus=0, max_restarts=-1, label_selector=node, fallback_strategy=ANY_NODE)(PoolShard)
        shards.append(shard.remote(number, num_shards, pool.uri, budget_bytes, labels))
    return shards


def order_nodes(nodes: Iterable[Mapping[str, Any]], driver_node: str) -> list[str]:
    """Return the ids of the nodes for shards, in order.

    These are the nodes labelled `POOL_LABEL` or, if there are none, all that are alive. `nodes` are the descriptions of
    `ray.nodes()`. The driver's node comes last: if it is lost, so is the run.
    """
    name, value = POOL_LABEL
    alive, reserved = [], []
    for node in nodes:
        if node["Alive"]:
            alive.append(node["NodeID"])
            if node.get("Labels", {}).get(name) == value:
                reserved.append(node["NodeID"])
    return sorted(reserved or alive, key=lambda node_id: (node_id == driver_node, node_id))


# --- Counting ---


def collect_counters(shards: Sequence[ActorProxy[PoolShard]]) -> dict[str, float]:
    """Collect the pool's metrics to log.

    They are the totals of all shards and, where there are several, those of each. A shard that does not answer is
    missing from them.
    """
    refs = [shard.get_counters.remote() for shard in shards]

    metrics: dict[str, float] = {}
    total = PoolCounters()
    for number, ref in enumerate(refs):
        try:
            counters = ray.get(ref, timeout=PING_TIMEOUT_S)
        except (RayActorError, GetTimeoutError):
            continue
        total += counters
        if len(shards) > 1:
            for name, value in _select_logged(counters).items():
                metrics[f"shard_{number}/{name}"] = value
    return metrics | _select_logged(total)


def _select_logged(counters: PoolCounters) -> dict[str, float]:
    values = {name: getattr(counters, name) for name in LOGGED_COUNTERS}
    values["memory_mib"] = counters.resident_bytes / MIB
    return values
