"""A process of a local Ray that has imported what a training is about to need.

Ray starts a process when somebody asks for one, and each takes a second to import Ray Data. A process that has done a
task stays and does the next one. It never becomes an actor.
"""

import importlib

import ray

from corun_ray.service.cluster.connect import is_local_ray


def warm_up(module: str) -> None:
    """Let a process of a local Ray import a module; return at once.

    Does nothing on a cluster, where each node has its own processes.
    """
    if is_local_ray():
        ray.remote(num_cpus=0)(_import_module).remote(module)


def _import_module(module: str) -> None:
    """Import a module in this process."""
    importlib.import_module(module)
