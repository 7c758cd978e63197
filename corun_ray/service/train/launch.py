"""Ray Train around the worker loop: how many workers, what is retried, and what a failure means for a person.

torch.distributed between workers on several machines: over the network by which Ray's nodes know each other.

gloo, which carries gradients where there are no GPUs, asks for the address of its machine's own name. On many machines
that is a loopback (Debian's `/etc/hosts` says 127.0.1.1), where no other machine can reach it: workers would wait for
each other until they time out. NCCL looks for interfaces by itself and needs no help."""

import functools
import os
from dataclasses import dataclass, replace

import psutil
import ray.util
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from corun_ray.config.jobs import ClusterSection
from corun_ray.service.errors import JobFailed, find_root_cause
from corun_ray.service.storage import Location, locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.plan import WorkerPlan
from corun_ray.service.train.recovery import find_start_checkpoint
from corun_ray.service.train.worker import train_worker

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class NodeTorchConfig(TorchConfig):
    """Ray Train's own set-up of the process group, after each worker has been told its interface."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group, backend_config) -> None:  # type: ignore[no-untyped-def]  # as in Ray
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Names gloo, in this process, the interface of the address by which Ray knows the node.

    What the node's environment says goes first; an address that is on none of its interfaces changes nothing.
    """
    if GLOO_INTERFACE in os.environ:
        return
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if address in (one.address for one in addresses):
            os.environ[GLOO_INTERFACE] = name
            return


def fit(plan: WorkerPlan, run: Location, console: Console) -> Result:
    """Trains from the last checkpoint of the run, if it has one, to the end; raises `JobFailed` and `StorageError`.

    Ray Train starts workers again that fail; its controller, should that die, is started again here. Both go on from
    the last checkpoint, and each may happen `cluster.max_failures` times.
    """
    failures, allowed = 0, plan.job.cluster.max_failures
    while True:
        try:
            return _trainer(replace(plan, start_from=find_start_checkpoint(run)), run.name).fit()
        except (RayActorError, TrainingFailedError) as error:
            failures += 1
            is_over = isinstance(error, TrainingFailedError) and not isinstance(error, ControllerError)
            if is_over or failures > allowed:
                lines = "".join(f"\n  {line}" for line in describe_failure(error))
                raise JobFailed(f"training failed; restarts allowed: {allowed}{lines}") from None
            console.say(f"  starting another controller: {'; '.join(describe_failure(error))}")


def describe_failure(error: Exception) -> list[str]:
    """A line a cause; whole tracebacks are in the run's errors.log."""
    if isinstance(error, WorkerGroupError):
        causes = {rank: find_root_cause(str(failure)) for rank, failure in sorted(error.worker_failures.items())}
        return [f"worker {rank}: {text}" for rank, text in causes.items()]
    if isinstance(error, ControllerError):
        return [f"Ray Train's controller: {find_root_cause(str(error.controller_failure))}"]
    return [f"Ray Train's controller died: {str(error).splitlines()[0]}"]


def _trainer(plan: WorkerPlan, name: str) -> TorchTrainer:
    job, storage = plan.job, locate(plan.job.storage)
    return TorchTrainer(
        functools.partial(train_worker, plan),
        torch_config=NodeTorchConfig(),
        scaling_config=make_scaling_config(job.cluster),
        run_config=RunConfig(
            name=name,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.train.keep_checkpoints),
        ),
    )


def make_scaling_config(cluster: ClusterSection) -> ScalingConfig:
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
