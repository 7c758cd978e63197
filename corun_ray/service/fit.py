"""Ray Train around the worker loop: how many workers, what is retried, and what a failure means for a person."""

import functools

from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from corun_ray.config import Cluster
from corun_ray.service.console import Console
from corun_ray.service.storage import locate
from corun_ray.service.worker import WorkerPlan, train_worker

RESIZE_EVERY_S = 60.0
"""Between two looks of an elastic job whether there is room for more workers."""


class JobFailed(Exception):
    """The job ended without its result; the message says why, for a person."""


def fit(plan: WorkerPlan, name: str, console: Console) -> Result:
    """Trains from the last checkpoint of the run called `name`, if it has one, to the end; raises `JobFailed`.

    Ray Train starts workers again that fail; its controller, should that die, is started again here. Both go on from
    the last checkpoint, and each may happen `cluster.max_failures` times.
    """
    failures = 0
    while True:
        try:
            return _trainer(plan, name).fit()
        except TrainingFailedError as error:
            allowed = plan.job.cluster.max_failures
            raise JobFailed(f"training failed; restarts allowed: {allowed}\n{error}") from None
        except RayActorError as error:
            failures += 1
            if failures > plan.job.cluster.max_failures:
                raise JobFailed(f"Ray Train's controller died {failures} times; the last time: {error}") from None
            console.say("  Ray Train's controller died: starting another one")


def _trainer(plan: WorkerPlan, name: str) -> TorchTrainer:
    job, storage = plan.job, locate(plan.job.storage)
    return TorchTrainer(
        functools.partial(train_worker, plan),
        scaling_config=_scaling(job.cluster),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.train.keep_checkpoints),
        ),
    )


def _scaling(cluster: Cluster) -> ScalingConfig:
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return ScalingConfig(
        num_workers=cluster.workers if cluster.is_elastic else cluster.max_workers,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
    )
