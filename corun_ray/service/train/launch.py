"""Starts the workers by Ray Train: their number, which failures are retried, and what a failure means for a person."""

import functools
from dataclasses import replace

from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from corun_ray.config.jobs import ClusterSection
from corun_ray.config.training import TrainSection
from corun_ray.core.metrics.catalog import choose_mode
from corun_ray.service.cluster.room import free_left_room
from corun_ray.service.errors import JobFailed, find_root_cause, format_reason
from corun_ray.service.storage import Location, locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.controller import find_lasting_failures
from corun_ray.service.train.failures import FailedForGood
from corun_ray.service.train.plan import WorkerPlan
from corun_ray.service.train.process_group import NodeTorchConfig
from corun_ray.service.train.recovery import find_start_checkpoint
from corun_ray.service.train.stopping import TrainingStop
from corun_ray.service.train.trainer import LeanTrainer
from corun_ray.service.train.worker import train_worker


def fit(plan: WorkerPlan, run: Location, console: Console, stop: TrainingStop) -> Result:
    """Train from the run's last checkpoint to the last step.

    Ray Train restarts failed workers. If its controller fails, `fit` starts another. Each resumes from the last
    checkpoint and may happen `cluster.max_failures` times. `stop` ends all of it.

    Raises `FailedForGood` for what a restart would meet again, `JobFailed` and `StorageError`.
    """
    try:
        return _fit_again_and_again(plan, run, console, stop)
    finally:
        stop.mark_ended()


def _fit_again_and_again(plan: WorkerPlan, run: Location, console: Console, stop: TrainingStop) -> Result:
    """Train as `fit` does, by as many controllers as it takes."""
    num_failures, allowed = 0, plan.job.cluster.max_failures
    while True:
        try:
            # Ray Train resumes by its own list of checkpoints; `start_from` takes its place where it is damaged.
            resumed = replace(plan, start_from=find_start_checkpoint(run))
            return _make_trainer(resumed, run.name, stop).fit()
        except (RayActorError, TrainingFailedError) as error:
            # A controller that died, or was killed to stop, still holds the room of its workers.
            if isinstance(error, RayActorError):
                free_left_room(error.actor_id)
            stop.refuse_stopped()
            num_failures += 1
            _refuse_lasting_failures(error)

            # Failed workers have had their restarts already; only a failed controller is started again.
            is_final = isinstance(error, TrainingFailedError) and not isinstance(error, ControllerError)
            if is_final or num_failures > allowed:
                lines = [f"training failed; restarts allowed: {allowed}", *describe_failure(error)]
                raise JobFailed("\n  ".join(lines)) from None
            console.say(f"  starting another controller: {'; '.join(describe_failure(error))}")


def _refuse_lasting_failures(error: Exception) -> None:
    """End the job where a worker has met what every restart would meet again.

    Raises `FailedForGood`.
    """
    lasting = find_lasting_failures(error.worker_failures) if isinstance(error, WorkerGroupError) else {}
    if lasting:
        lines = ["training failed; not restarted, for it would fail again:"]
        lines += [f"worker {rank}: {reason}" for rank, reason in lasting.items()]
        raise FailedForGood("\n  ".join(lines)) from None


def describe_failure(error: Exception) -> list[str]:
    """Describe a failure of Ray Train, one cause a line.

    The run's errors.log has the tracebacks.
    """
    if isinstance(error, WorkerGroupError):
        lines = []
        for rank, failure in sorted(error.worker_failures.items()):
            lines.append(f"worker {rank}: {find_root_cause(str(failure))}")
        return lines

    if isinstance(error, ControllerError):
        return [f"Ray Train's controller: {find_root_cause(str(error.controller_failure))}"]
    return [f"Ray Train's controller died: {format_reason(error)}"]


def _make_trainer(plan: WorkerPlan, name: str, stop: TrainingStop) -> LeanTrainer:
    """Make the trainer of the run `name` in the job's storage."""
    job, storage = plan.job, locate(plan.job.storage)
    return LeanTrainer(
        plan.board,
        stop,
        train_loop_per_worker=functools.partial(train_worker, plan),
        torch_config=NodeTorchConfig(),
        scaling_config=make_scaling_config(job.cluster),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
            checkpoint_config=make_checkpoint_config(job.train),
        ),
    )


def make_checkpoint_config(train: TrainSection) -> CheckpointConfig:
    """Return which checkpoints Ray Train keeps: the last ones, or the best by `train.best` beside the last."""
    if train.best is None:
        return CheckpointConfig(num_to_keep=train.keep_checkpoints)
    return CheckpointConfig(
        num_to_keep=train.keep_checkpoints,
        checkpoint_score_attribute=train.best,
        checkpoint_score_order=choose_mode(train.best),
    )


def make_scaling_config(cluster: ClusterSection) -> ScalingConfig:
    """Return the number of workers and the resources of each."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker

    # An elastic job has a range of workers (fewest, most).
    return ScalingConfig(
        num_workers=cluster.workers if cluster.is_elastic else cluster.max_workers,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=cluster.resize_every_s,
    )
