"""Ray Train around the worker loop: how many workers, what is retried, and what a failure means for a person."""

import functools
from dataclasses import replace

from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from corun_ray.config.jobs import Cluster
from corun_ray.service.errors import JobFailed, root_cause
from corun_ray.service.storage import Location, locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.plan import WorkerPlan
from corun_ray.service.train.process_group import NodeTorchConfig
from corun_ray.service.train.recovery import start_from
from corun_ray.service.train.worker import train_worker


def fit(plan: WorkerPlan, run: Location, console: Console) -> Result:
    """Trains from the last checkpoint of the run, if it has one, to the end; raises `JobFailed` and `StorageError`.

    Ray Train starts workers again that fail; its controller, should that die, is started again here. Both go on from
    the last checkpoint, and each may happen `cluster.max_failures` times.
    """
    failures, allowed = 0, plan.job.cluster.max_failures
    while True:
        try:
            return _trainer(replace(plan, start_from=start_from(run)), run.name).fit()
        except (RayActorError, TrainingFailedError) as error:
            failures += 1
            is_over = isinstance(error, TrainingFailedError) and not isinstance(error, ControllerError)
            if is_over or failures > allowed:
                lines = "".join(f"\n  {line}" for line in reasons(error))
                raise JobFailed(f"training failed; restarts allowed: {allowed}{lines}") from None
            console.say(f"  starting another controller: {'; '.join(reasons(error))}")


def reasons(error: Exception) -> list[str]:
    """A line a cause; whole tracebacks are in the run's errors.log."""
    if isinstance(error, WorkerGroupError):
        causes = {rank: root_cause(str(failure)) for rank, failure in sorted(error.worker_failures.items())}
        return [f"worker {rank}: {text}" for rank, text in causes.items()]
    if isinstance(error, ControllerError):
        return [f"Ray Train's controller: {root_cause(str(error.controller_failure))}"]
    return [f"Ray Train's controller died: {str(error).splitlines()[0]}"]


def _trainer(plan: WorkerPlan, name: str) -> TorchTrainer:
    job, storage = plan.job, locate(plan.job.storage)
    return TorchTrainer(
        functools.partial(train_worker, plan),
        torch_config=NodeTorchConfig(),
        scaling_config=scaling(job.cluster),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.train.keep_checkpoints),
        ),
    )


def scaling(cluster: Cluster) -> ScalingConfig:
    """As many workers as the section says, with what each asks for."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return ScalingConfig(
        num_workers=cluster.workers if cluster.is_elastic else cluster.max_workers,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=cluster.resize_every_s,
    )
