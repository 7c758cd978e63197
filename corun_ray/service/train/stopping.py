"""Ends a training from another thread of the driver, where nobody follows it or another driver has its run."""

import threading
from contextlib import suppress

import ray
from ray.actor import ActorProxy
from ray.exceptions import GetTimeoutError, RayError

from corun_ray.service.errors import JobFailed
from corun_ray.service.train.board import BoardState

POLL_S = 0.5
ANSWER_S = 10.0


class TrainingStop:
    """Ends the workers at once; the training then fails for the first reason that was given."""

    def __init__(self, board: ActorProxy[BoardState]) -> None:
        self._board = board
        self._lock = threading.Lock()
        self._reason: JobFailed | None = None
        self._ended = threading.Event()

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
            with suppress(GetTimeoutError, RayError):
                controller = ray.get(self._board.get_controller.remote(), timeout=ANSWER_S)
                if controller is not None:
                    ray.kill(controller)
                    return

    def refuse_stopped(self) -> None:
        """Raise the reason of `stop`, if it was called."""
        if self._reason is not None:
            raise self._reason from None

    def mark_ended(self) -> None:
        """Tell that there is nothing left to end."""
        self._ended.set()
