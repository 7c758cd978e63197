"""What one worker, of rank 0, does with the whole label pool: restore it, save it, sweep up."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import RETURN_TIMEOUT_S, Call, PoolError, insist
from corun_ray.service.pool.shard import PartOfSave
from corun_ray.service.storage import Location


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
