"""What Ray Train's controller loads of this service: its policies, and notes of its start.

The controller does without torch, whose import would delay every training by seconds.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray.actor import ActorProxy
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, WorkerGroupContext
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from corun_ray.service.cluster.warm_up import warm_up
from corun_ray.service.start_times import StartPhase
from corun_ray.service.train.board import BoardState

DIED = "its process has ended: killed, out of memory, or with its node"


class LastingFailure(Exception):
    """A failure of a worker that every restart would meet again; the message is the reason on one line."""


def find_lasting_failures(failures: Mapping[int, Exception]) -> dict[int, str]:
    """Return rank → reason of the workers whose failure would come again.

    `failures` are Ray Train's, by rank.
    """
    found = {}
    for rank, failure in sorted(failures.items()):
        # Ray Train wraps what a worker raised.
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, LastingFailure):
            found[rank] = str(cause)
    return found


class RestartPolicy(DefaultFailurePolicy):
    """Ray Train's policy, but for failures that a restart would meet again. Posts to the board which workers died."""

    def __init__(self, failure_config: FailureConfig, board: ActorProxy[BoardState]) -> None:
        super().__init__(failure_config)
        self._board = board

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Decide whether the workers start again."""
        error = training_failed_error
        if isinstance(error, WorkerGroupError):
            # A worker that died says nothing itself, and the others may be ended before they say what they saw of it.
            for rank, failure in sorted(error.worker_failures.items()):
                if isinstance(failure, WorkerHealthCheckFailedError):
                    self._board.post_error.remote(rank, DIED, str(failure))
            if find_lasting_failures(error.worker_failures):
                return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class StartCallback(ControllerCallback, WorkerGroupCallback):
    """Posts to the board how long controller and workers take to start, and has a task of the stream start early.

    The driver makes it when the start begins.
    """

    def __init__(self, board: ActorProxy[BoardState]) -> None:
        self._board, self._since_s = board, time.time()

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Note the start of the controller."""
        self._post("Ray Train's controller starts")

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Begin to count the start of the workers."""
        self._since_s = time.time()

    def before_init_train_context(self, workers: Sequence[Worker]) -> dict[str, list[Any]]:
        """Note the start of the workers' processes, and begin that of the stream; return nothing for Ray Train."""
        self._post("worker processes start")

        # The workers take seconds until they want the first samples.
        warm_up("corun_ray.service.data.stream")
        return {}

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Note what Ray Train did in the workers."""
        self._post("workers import torch and join each other")

    def _post(self, name: str) -> None:
        """Post the phase that ends now; the next one begins."""
        phase = StartPhase(self._since_s, time.time(), name)
        self._since_s = phase.end_s
        self._board.post_start.remote([phase])


class QuickPolicy(FixedScalingPolicy):
    """Starts the workers of a local Ray without waiting until their resources are registered.

    They are registered with an actor that shares a cluster's nodes among trainings and streams. Its process takes a
    second to start, and on a local Ray nobody else trains.
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Register the workers' resources in another thread."""
        register = super().after_controller_start
        self._registration = threading.Thread(target=register, args=(train_run_context,), daemon=True)
        self._registration.start()

    def _maybe_send_resource_request(self) -> None:
        """Renew the registration, once there is one."""
        if not self._registration.is_alive():
            super()._maybe_send_resource_request()


class ForgetLocalSettings(ControllerCallback):
    """Removes from the controller's environment what it has read there, on a local Ray.

    Ray Train would hand the variable to the workers once more, as a runtime environment. Processes of such an
    environment import Ray twice, and none of those that Ray keeps ready can be one of them.
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Remove the variable that `connect` has set."""
        os.environ.pop(ENABLE_PREEMPTION_WATCHER_ENV_VAR, None)
