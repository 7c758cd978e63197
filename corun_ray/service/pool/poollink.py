"""One process's line to one shard of the label pool: what it does while the shard is away, and when it is back."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from corun_ray.core.training.labels import Label
from corun_ray.service.pool.shard import Reply

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
