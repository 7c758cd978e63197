"""One worker's client to the label pool that all training workers share.

A shard that dies is restarted and restores its labels from the last snapshot. Workers still hold the labels that they
made since, and offer them again. Meanwhile training continues: a missing label is replaced by the teacher's.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.actor import ActorProxy
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from corun_ray.core.training.labels import Label
from corun_ray.service.pool.shard import PoolShard, Reply, assign_shard

READ_TIMEOUT_S = 20.0
"""A shard that does not answer a read for so long counts as away, and its labels as missing, until it answers."""
RETURN_TIMEOUT_S = 300.0
"""How long a checkpoint waits for a shard that is away."""
PING_TIMEOUT_S = 5.0
PAUSE_S = 0.2
"""Between two pings of a shard that is away."""
FETCHER = ThreadPoolExecutor(1, thread_name_prefix="label-pool")
"""Reads for all clients of a process. One thread only: with more, Ray (2.60) can lose track of an object while it
fetches the object, if another thread releases the same object at that moment. The fetch then never ends."""

T = TypeVar("T")


class PoolError(Exception):
    """The pool cannot be saved; the message is one line."""


@dataclass
class ReadWaits:
    """Statistics of a client's reads, as seen by the callers."""

    ready: int = 0
    """Reads whose labels had arrived when they were asked for."""
    late: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True)
class PendingRead:
    """A read under way; implements `core.training.labels.PendingLabels`."""

    _future: Future[list[Label | None]]
    _waits: ReadWaits

    def result(self) -> list[Label | None]:
        """Wait for the labels, None where the pool has none.

        There is one item for each key.
        """
        is_ready = self._future.done()
        start_s = time.perf_counter()
        labels = self._future.result()

        self._waits.waited_s += time.perf_counter() - start_s
        if is_ready:
            self._waits.ready += 1
        else:
            self._waits.late += 1
        return labels


class PoolClient:
    """One worker's view of the shared pool; implements `core.training.labels.LabelPool`.

    A read costs one round trip to each shard that holds one of its keys, made by a thread beside the step. A worker
    reads back everything it has offered, except that a read under way may miss labels offered meanwhile.
    """

    def __init__(self, shards: Sequence[ActorProxy[PoolShard]], generation: int) -> None:
        self._links = [ShardLink(shard, number, generation) for number, shard in enumerate(shards)]
        self.waits = ReadWaits()

    def prefetch(self, keys: Sequence[str]) -> PendingRead:
        """Start reading the labels of `keys`.

        Arrays are read in place on the node that holds them.
        """
        return PendingRead(FETCHER.submit(self._read, keys), self.waits)

    def offer(self, labels: Sequence[Label]) -> None:
        """Hand over labels without waiting.

        The shards compare each label again.
        """
        for link, labels_of_shard in self._group_by_link((label.key, label) for label in labels):
            link.offer(labels_of_shard)

    def settle(self) -> None:
        """Wait until all offers of this worker have been decided.

        Raises `PoolError` if a shard is away for more than `RETURN_TIMEOUT_S`.
        """
        deadline_s = time.monotonic() + RETURN_TIMEOUT_S
        for link in self._links:
            link.settle(deadline_s)

    def _read(self, keys: Sequence[str]) -> list[Label | None]:
        """Return the labels of `keys`.

        None where there is no label, or where it cannot be fetched now.
        """
        # Ask all shards at once.
        asked = []
        for link, keys_of_shard in self._group_by_link(zip(keys, keys, strict=True)):
            asked.append((link, keys_of_shard, link.read(keys_of_shard)))

        # Collect the references of each shard. A shard that is away gives none.
        refs: dict[str, tuple[ShardLink, ray.ObjectRef]] = {}
        for link, keys_of_shard, reply in asked:
            refs_of_shard = link.receive(reply) or [None] * len(keys_of_shard)
            for key, ref in zip(keys_of_shard, refs_of_shard, strict=True):
                if ref is not None:
                    refs[key] = (link, ref)

        # Fetch all labels together. If one is lost, fetch them one by one to keep the others.
        labels: dict[str, Label | None]
        try:
            found = ray.get([ref for _, ref in refs.values()], timeout=READ_TIMEOUT_S)
            labels = dict(zip(refs, found, strict=True))
        except RayError:
            labels = {}
            for key, (link, ref) in refs.items():
                labels[key] = _fetch_one(link, key, ref)
        return [labels.get(key) for key in keys]

    def _group_by_link(self, keyed: Iterable[tuple[str, T]]) -> list[tuple["ShardLink", list[T]]]:
        """Group items by the shards of their keys."""
        by_shard: defaultdict[int, list[T]] = defaultdict(list)
        for key, item in keyed:
            by_shard[assign_shard(key, len(self._links))].append(item)
        return [(self._links[number], items) for number, items in by_shard.items()]


def _fetch_one(link: "ShardLink", key: str, ref: ray.ObjectRef) -> Label | None:
    """Fetch one label; return None where it cannot be had.

    Its shard may have died, or its segment be out of reach.
    """
    try:
        return ray.get(ref, timeout=PING_TIMEOUT_S)
    except GetTimeoutError:
        return None  # The label is still on its way.
    except RayError:
        link.forget(key, ref)
        return None


class ShardLink:
    """One worker's view of one shard: whether it answers, and the labels that only this worker may still hold.

    A shard is either present or away. It is away from a call that was not answered until a ping is answered; meanwhile
    reads give nothing, and offers are only held. A shard that has lost its process comes back with the labels of the
    last snapshot, and is offered everything made since. `read`, `receive` and `forget` may run in another thread than
    the rest.
    """

    def __init__(self, shard: ActorProxy[PoolShard], number: int, generation: int) -> None:
        self._shard, self._number, self._generation = shard, number, generation
        self._lock = threading.RLock()
        self._incarnation: int | None = None
        """Which start of the shard's process answered last."""
        self._probe: ray.ObjectRef | None = None
        """A ping under way to a shard that is away; None while the shard is present."""
        self._unsaved: dict[str, Label] = {}
        """Labels offered since the last snapshot."""

    def read(self, keys: Sequence[str]) -> "ray.ObjectRef[Reply] | None":
        """Start reading; return None if the shard is away."""
        return self._shard.read.remote(list(keys)) if self._is_present() else None

    def receive(self, ref: "ray.ObjectRef[Reply] | None") -> list[ray.ObjectRef | None] | None:
        """Wait for the reply to `read`.

        Returns None if the shard turned out to be away.
        """
        if ref is None:
            return None

        # A read that is not answered makes the shard away: later reads do not wait for it.
        try:
            reply = ray.get(ref, timeout=READ_TIMEOUT_S)
        except (RayActorError, GetTimeoutError):
            self._start_probe()
            return None

        # Every reply tells which process answers, and so whether labels must be offered again.
        self._note_state(reply.incarnation, reply.saved_step)
        return reply.labels

    def offer(self, labels: Sequence[Label]) -> None:
        """Hand over labels without waiting.

        The worker holds them until storage has them.
        """
        with self._lock:
            # Hold them first: a shard that is away is offered them when it is back.
            for label in labels:
                self._unsaved[label.key] = label
            if self._is_present():
                self._shard.offer.remote(self._generation, list(labels))

    def settle(self, deadline_s: float) -> None:
        """Wait until all offers so far have been decided.

        If need be, this waits until the shard is back.

        Raises `PoolError` past the deadline (of `time.monotonic`).
        """
        while time.monotonic() < deadline_s:
            # Calls are answered in order: a ping's answer means that all offers before it have been decided. Unless
            # the shard has restarted: then its labels have just been offered again, and another ping must follow.
            try:
                state = ray.get(self._shard.ping.remote(), timeout=PING_TIMEOUT_S)
                if not self._note_state(*state):
                    self._probe = None
                    return
            except (RayActorError, GetTimeoutError):
                self._start_probe()
            time.sleep(PAUSE_S)
        raise PoolError(f"label pool: shard {self._number} has not come back in {RETURN_TIMEOUT_S:.0f} s")

    def forget(self, key: str, label: ray.ObjectRef) -> None:
        """Tell the shard that a label could not be fetched."""
        self._shard.forget.remote(self._generation, [(key, label)])

    def _is_present(self) -> bool:
        """Return whether the shard answers, without waiting."""
        with self._lock:
            # No ping is under way: the shard answered the last call.
            if self._probe is None:
                return True

            # The ping is not answered yet: the shard is still away.
            if not ray.wait([self._probe], timeout=0)[0]:
                return False

            # The ping is answered: the shard is back, unless it has yet to restore its labels.
            try:
                incarnation, saved_step = ray.get(self._probe)
                if incarnation is not None:
                    self._probe = None
                    self._note_state(incarnation, saved_step)
                    return True
            except RayActorError:
                pass

            # The ping failed: try the next one.
            self._start_probe()
            return False

    def _start_probe(self) -> None:
        """Take the shard as away until a ping is answered."""
        with self._lock:
            self._probe = self._shard.ping.remote()

    def _note_state(self, incarnation: int | None, saved_step: int) -> bool:
        """Note the shard's state; return whether to ask again.

        A shard that has restarted is offered the labels that it cannot have from storage.
        """
        with self._lock:
            # The shard answers, but has yet to restore its labels: it is as good as away.
            if incarnation is None:
                self._start_probe()
                return True

            # A complete snapshot has every label made before its step: hold the later ones alone.
            for key, label in list(self._unsaved.items()):
                if label.step < saved_step:
                    del self._unsaved[key]

            # Another incarnation than last time means that the shard's process has restarted and lost its memory.
            has_restarted = self._incarnation not in (None, incarnation)
            self._incarnation = incarnation
            if has_restarted and self._unsaved:
                self._shard.offer.remote(self._generation, list(self._unsaved.values()))
            return has_restarted
