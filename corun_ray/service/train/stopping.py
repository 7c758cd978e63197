"""Ends a training from another thread of the driver, where nobody follows it or another driver has its run."""

import threading
from contextlib import suppress

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from corun_ray.service.errors import JobFailed

POLL_S = 0.5


class TrainingStop:
    """Ends the workers at once; the training then fails for the first reason that was given."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: JobFailed | None = None
        self._controller: ActorHandle | None = None
        """Ray Train's last controller, which owns the workers."""
        self._ended = threading.Event()

    def watch(self, controller: ActorHandle) -> None:
        """Remember the controller that `stop` is to end."""
        self._controller = controller

    def stop(self, reason: JobFailed) -> None:
        """End the training, from any thread but that of `fit`.

        Returns when the controller, and with it all workers, have been killed, or training has ended.
        """
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason

        # The controller may start only now.
        while not self._ended.wait(POLL_S):
            controller = self._controller
            if controller is not None:
                with suppress(RayError):
                    ray.kill(controller)
                    return

    def refuse_stopped(self) -> None:
        """Raise the reason of `stop`, if it was called."""
        if self._reason is not None:
            raise self._reason from None

    def mark_ended(self) -> None:
        """Tell that there is nothing left to end."""
        self._ended.set()
        # An actor lives as long as somebody holds a handle to it.
        self._controller = None
