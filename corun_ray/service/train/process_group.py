"""The process group of the training workers, and the network interface of gloo.

gloo carries gradients where there are no GPUs. It looks up the address of its machine's own name. On many machines
this is a loopback address (Debian's /etc/hosts says 127.0.1.1), which no other machine can reach: workers would wait
for each other until they time out. NCCL finds interfaces by itself.

Ray Train's controller loads this module. Ray Train's own `TorchConfig` would have it import torch, for two seconds
before any worker starts, only to name the functions that the workers call. Here the workers name them.
"""

import os
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.train
import ray.util
from ray.exceptions import GetTimeoutError
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""The environment variable that names gloo's network interface."""
LEAVE_S = 30.0
"""How long the end of a process group may take, as in Ray Train."""


@dataclass
class NodeTorchConfig(BackendConfig):
    """What Ray Train's `TorchConfig` says of a process group of CPUs or GPUs."""

    backend: str | None = None
    """Ray Train's trainer chooses it: gloo, or nccl where workers have GPUs."""
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend that Ray Train starts."""
        return _NodeBackend

    @property
    def train_func_context(self) -> type[AbstractContextManager[None]]:
        """What the training runs in, in every worker."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        """The framework, for Ray's dashboard."""
        return TrainingFramework.TORCH


class _NodeBackend(Backend):
    """Ray Train's backend for torch, with `use_interface_of_node` before its start."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """Form the process group of all workers."""
        assert isinstance(backend_config, NodeTorchConfig)
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_join_group, backend_config, address, port)

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """End the process group, as long as the workers take to say that they did."""
        left: list[Any] = worker_group.execute_async(_leave_group)
        with suppress(GetTimeoutError):
            ray.get(left, timeout=LEAVE_S)


def _join_group(config: NodeTorchConfig, address: str, port: int) -> None:
    """Join the process group as Ray Train's own backend does, in a worker.

    Address and port are those of rank 0.
    """
    use_interface_of_node()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)

    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    _set_torch_distributed_env_vars()
    assert config.backend is not None
    context = ray.train.get_context()
    _setup_torch_process_group(
        backend=config.backend,
        world_rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        init_method="env://",
        timeout_s=config.timeout_s,
    )


def _leave_group() -> None:
    """Leave the process group, in a worker."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=ray.train.get_context().get_world_size() > 1)


def use_interface_of_node() -> None:
    """Tell gloo, in this process, the node's network interface.

    It is the interface of the address by which Ray knows the node. A value that the environment already has stays. An
    address of none of the interfaces changes nothing.
    """
    if GLOO_INTERFACE in os.environ:
        return

    node_address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if node_address in [one.address for one in addresses]:
            os.environ[GLOO_INTERFACE] = name
            return
