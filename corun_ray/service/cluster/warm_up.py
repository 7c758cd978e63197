"""Processes of a local Ray that have imported what a training is about to need.

Ray starts a process when somebody asks for it, and each takes a second to import Ray Data. A process that has done a
task stays, and becomes the next actor or does the next task.
"""

import importlib

import ray

from corun_ray.service.cluster.connect import is_local_ray


def warm_up(module: str, processes: int) -> None:
    """Let processes of a local Ray import a module; return at once.

    Ray keeps as many idle processes as there are CPUs. Does nothing on a cluster, where each node has its own.
    """
    if is_local_ray():
        task = ray.remote(num_cpus=0)(_import_module)
        for _ in range(processes):
            task.remote(module)


def _import_module(module: str) -> None:
    """Import a module in this process."""
    importlib.import_module(module)
