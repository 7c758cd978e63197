"""torch.distributed between workers on several machines: over the network by which Ray's nodes know each other.

gloo, which carries gradients where there are no GPUs, asks for the address of its machine's own name. On many machines
that is a loopback (Debian's `/etc/hosts` says 127.0.1.1), where no other machine can reach it: workers would wait for
each other until they time out. NCCL looks for interfaces by itself and needs no help.
"""

import os
from dataclasses import dataclass

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

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
