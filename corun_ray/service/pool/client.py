"""The optimal label pool that all training workers share: its shards, and one worker's client to them.

A shard that dies comes back and restores its labels from the last snapshot; what workers made since, they still hold
and hand over again. Meanwhile training goes on: a label that cannot be had is taken from the teacher.


One process's line to one shard of the label pool: what it does while the shard is away, and when it is back."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from corun_ray.core.training.labels import Label
from corun_ray.service.pool.shard import Reply, shard_of

READ_TIMEOUT_S = 20.0
"""A shard that does not answer for so long counts as away, and its labels as missing, until it answers again."""
RETURN_TIMEOUT_S = 300.0
"""For so long a checkpoint waits for a shard that is away."""
PING_S = 5.0
PAUSE_S = 0.2
Call = Callable[[Any], ray.ObjectRef]


class PoolError(Exception):
    """The pool cannot be saved; the message is one line."""


class ShardLink:
    """One worker's view of one shard: whether it answers, and the labels that only this worker may still hold.

    `read`, `reply` and `forget` may run in another thread than the rest.
    """

    def __init__(self, actor: Any, number: int, generation: int) -> None:
        self.actor, self.number, self.generation = actor, number, generation
        self._lock = threading.RLock()
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
        with self._lock:
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

    def forget(self, key: str, label: ray.ObjectRef) -> None:
        """Tells the shard that this label of `key` could not be had."""
        self.actor.forget.remote(self.generation, [(key, label)])

    def _answers(self) -> bool:
        with self._lock:
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
                self._lose()
            return False

    def _lose(self) -> None:
        with self._lock:
            self._probe = self.actor.ping.remote()

    def _hear(self, incarnation: int | None, saved_step: int) -> bool:
        """Takes note of how the shard stands; says whether it must be asked again.

        A shard that has restarted is handed what it cannot have from storage.
        """
        with self._lock:
            if incarnation is None:
                self._lose()
                return True
            self._held = {key: label for key, label in self._held.items() if label.step >= saved_step}
            is_new = self._incarnation not in (None, incarnation)
            self._incarnation = incarnation
            if is_new and self._held:
                self.actor.offer.remote(self.generation, list(self._held.values()))
            return is_new


def insist(shard: Any, call: Call, number: int, deadline_s: float, first: ray.ObjectRef | None = None) -> Any:
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


MIB = 2**20
FETCHER = ThreadPoolExecutor(1, thread_name_prefix="label-pool")
"""Reads for all clients of a process. With more threads than one, Ray (2.60) can forget where an object is
while it fetches it: when another thread gives up the same object at that moment, the fetch never ends."""


@dataclass
class ReadWaits:
    """How the reads of a client went, as those who asked saw it."""

    ready: int = 0
    """Reads whose labels were there when they were asked for."""
    late: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True)
class PendingRead:
    """A read under way; a `core.labels.PendingLabels`."""

    _future: Future[list[Label | None]]
    _waits: ReadWaits

    def result(self) -> list[Label | None]:
        """See `PendingLabels`."""
        is_ready, asked_s = self._future.done(), time.perf_counter()
        found = self._future.result()
        self._waits.waited_s += time.perf_counter() - asked_s
        self._waits.ready += is_ready
        self._waits.late += not is_ready
        return found


class PoolClient:
    """One worker's view of the shared pool; a `core.labels.LabelPool`.

    A step costs one round trip to each shard that it touches, and a thread makes it. What a worker has offered, it
    reads back; what it offers while a read is under way, that read may see or not.
    """

    def __init__(self, shards: Sequence[Any], generation: int) -> None:
        self._links = [ShardLink(actor, number, generation) for number, actor in enumerate(shards)]
        self.waits = ReadWaits()

    def prefetch(self, keys: Sequence[str]) -> PendingRead:
        """Starts reading the labels of `keys`; arrays are read in place on the node that holds them."""
        return PendingRead(FETCHER.submit(self._read, keys), self.waits)

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

    def _read(self, keys: Sequence[str]) -> list[Label | None]:
        """Asks all shards at once, then waits for the labels; None where there is none, or it cannot be had now."""
        asked = [(link, some, link.read(some)) for link, some in self._by_link((key, key) for key in keys)]
        refs = {
            key: (link, ref)
            for link, some, reply in asked
            for key, ref in zip(some, link.reply(reply) or (), strict=False)
            if ref is not None
        }
        try:
            found = ray.get([ref for _, ref in refs.values()], timeout=READ_TIMEOUT_S)
            labels = dict(zip(refs, found, strict=True))
        except RayError:
            labels = {key: label for key, (link, ref) in refs.items() if (label := _fetch_one(link, key, ref))}
        return [labels.get(key) for key in keys]

    def _by_link(self, items: Iterable[tuple[str, Any]]) -> list[tuple[ShardLink, list[Any]]]:
        found = defaultdict(list)
        for key, item in items:
            found[shard_of(key, len(self._links))].append(item)
        return [(self._links[number], some) for number, some in found.items()]


def _fetch_one(link: ShardLink, key: str, ref: ray.ObjectRef) -> Label | None:
    """One label where not all could be had: its shard may have died since, or its segment be out of reach."""
    try:
        return ray.get(ref, timeout=PING_S)
    except GetTimeoutError:
        return None  # still on its way
    except RayError:
        link.forget(key, ref)
        return None
