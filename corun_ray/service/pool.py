"""The optimal label pool as a Ray actor that all training workers share.

The actor holds the index and the rule (`core.labels`); the labels themselves lie in Ray's object store. The actor
puts them there itself, so that it owns them: they outlive the worker that made them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import ray

from corun_ray.core.labels import Label, Scores, supersedes
from corun_ray.service import snapshots
from corun_ray.service.storage import locate

READ_TIMEOUT_S = 60.0


@dataclass
class PoolCounters:
    """Totals since the pool was made or restored."""

    labels: int = 0
    offers: int = 0
    wins: int = 0
    """Offers that the pool took."""
    reads: int = 0
    hits: int = 0
    """Reads that found a label."""


class Entry(NamedTuple):
    """What the index knows of a label."""

    scores: Scores
    ref: ray.ObjectRef


class PoolIndex:
    """The pool's content and its rule; `PoolActor` adds remoteness.

    `generation` numbers the starts of the worker group. A restored pool stands where the checkpoint stood, and an
    offer that a dead worker left under way must not undo that.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._counters = PoolCounters()
        self._generation = 0

    def read(self, keys: Sequence[str]) -> list[ray.ObjectRef | None]:
        """References to the stored labels of `keys`, None where there is none."""
        found = [self._entries.get(key) for key in keys]
        self._counters.reads += len(keys)
        self._counters.hits += sum(entry is not None for entry in found)
        return [entry.ref if entry else None for entry in found]

    def offer(self, generation: int, labels: Sequence[Label]) -> list[bool]:
        """Keeps each label that supersedes the stored one; says which."""
        if generation != self._generation:
            return [False] * len(labels)
        taken = [self._keep_if_better(label) for label in labels]
        self._counters.offers += len(labels)
        self._counters.wins += sum(taken)
        return taken

    def _keep_if_better(self, label: Label) -> bool:
        stored = self._entries.get(label.key)
        if not supersedes(label.scores, stored.scores if stored else None):
            return False
        self._entries[label.key] = Entry(label.scores, ray.put(label))
        return True

    def counters(self) -> dict[str, int]:
        """See `PoolCounters`."""
        return asdict(replace(self._counters, labels=len(self._entries)))

    def save(self, uri: str) -> int:
        """Writes every label to a Parquet file, visible only when complete; returns their number."""
        refs = [entry.ref for _, entry in sorted(self._entries.items())]
        snapshots.write(locate(uri), (ray.get(ref) for ref in refs))
        return len(refs)

    def restore(self, uri: str | None, generation: int) -> int:
        """Makes the pool what the snapshot at `uri` holds (None: empty) for this start of the workers."""
        labels = snapshots.read(locate(uri)) if uri else ()
        self._entries = {label.key: Entry(label.scores, ray.put(label)) for label in labels}
        self._counters, self._generation = PoolCounters(), generation
        return len(self._entries)


class PendingRead:
    """A read under way; see `core.labels.PendingLabels`."""

    def __init__(self, refs: ray.ObjectRef) -> None:
        self._refs = refs

    def result(self) -> list[Label | None]:
        """Waits for the labels; arrays are read in place on the pool's own node."""
        refs = ray.get(self._refs, timeout=READ_TIMEOUT_S)
        labels = iter(ray.get([ref for ref in refs if ref is not None], timeout=READ_TIMEOUT_S))
        return [None if ref is None else next(labels) for ref in refs]


class PoolClient:
    """One worker's view of the shared pool; a `core.labels.LabelPool`.

    A worker's calls reach the actor in the order in which it made them: what it offered, it reads back.
    """

    def __init__(self, actor: Any, generation: int) -> None:
        self._actor = actor
        self._generation = generation

    def prefetch(self, keys: Sequence[str]) -> PendingRead:
        """Starts reading the labels of `keys`."""
        return PendingRead(self._actor.read.remote(list(keys)))

    def offer(self, labels: Sequence[Label]) -> None:
        """Hands labels over without waiting; the actor compares each again."""
        self._actor.offer.remote(self._generation, list(labels))

    def flush(self) -> None:
        """Waits until everything offered by this worker has been decided."""
        ray.get(self._actor.counters.remote(), timeout=READ_TIMEOUT_S)


def start_pool() -> Any:
    """The pool as an actor, alive as long as the driver holds the handle."""
    return ray.remote(num_cpus=0)(PoolIndex).remote()
