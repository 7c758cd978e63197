"""Ray Train's trainer, without what a training has no use for.

On two cores a process of Ray takes two seconds to start, and Ray Train starts three that nobody needs here.
"""

from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.actor import ActorHandle, ActorProxy
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from corun_ray.service.cluster.connect import is_local_ray
from corun_ray.service.train.board import BoardState
from corun_ray.service.train.controller import ForgetLocalSettings, QuickPolicy, RestartPolicy, StartCallback
from corun_ray.service.train.stopping import TrainingStop


class StoppableTrainer(TorchTrainer):
    """Leaves Ctrl-C to the command.

    Ray Train's own handler waits for its controller, which heeds nothing while it waits for room, and ends the process
    with exit code 0.
    """

    def _register_sigint_handler(self, controller: ActorHandle) -> None:
        """Register nothing."""


class LeanTrainer(StoppableTrainer):
    """Ray Train's trainer with our policy of restarts, for which Ray Train has no option, and fewer processes."""

    def __init__(self, board: ActorProxy[BoardState], stop: TrainingStop, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._board, self._stop = board, stop

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Return Ray Train's callbacks, and ours."""
        # The workers stream their samples themselves: no dataset is handed to Ray Train.
        unused: list[type[RayTrainCallback]] = [DatasetsCallback]
        added: list[RayTrainCallback] = [StartCallback(self._board)]
        if is_local_ray():
            # The cleaner looks after the room of dead controllers, and asks the dashboard, which a local Ray has not.
            unused.append(PlacementGroupCleanerCallback)
            added.append(ForgetLocalSettings())
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # the stubs are of Ray Train 1
        return [one for one in callbacks if not isinstance(one, tuple(unused))] + added

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        """Run the training in a controller on this node."""
        arguments["failure_policy"] = RestartPolicy(arguments["failure_policy"].failure_config, self._board)

        policy = arguments["scaling_policy"]
        if is_local_ray() and isinstance(policy, FixedScalingPolicy):
            arguments["scaling_policy"] = QuickPolicy(policy.scaling_config)

        # The processes of a local Ray have this process's environment. Those of a cluster are given Ray Train's part.
        options: dict[str, Any] = {}
        if not is_local_ray():
            variables = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"} | get_env_vars_to_propagate()
            options["runtime_env"] = {"env_vars": variables}
        node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        actor_class: Any = ray.remote(num_cpus=0, label_selector=node, **options)(TrainController)
        controller = actor_class.remote(**arguments)

        # Only the end of the controller ends the workers.
        self._stop.watch(controller)
        ray.get(controller.run.remote())
        result: Result = ray.get(controller.get_result.remote())
        return result
