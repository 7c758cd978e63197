"""Whether a job's workers have the compiler that its network needs, as far as this machine can tell."""

import os
from collections.abc import Mapping

from corun_ray.config.jobs import Job, TrainingJob
from corun_ray.core.training.compilers import CannotCompile, find_missing_compiler
from corun_ray.service.cluster.ports import read_ray_address

DISABLING = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")
"""Variables by which torch compiles nothing, whatever is asked, where they are 1."""


def refuse_impossible_compiling(job: Job, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a training on this machine's CPUs that is to be compiled, and cannot be.

    Other workers try it themselves before their first step: those of a cluster have compilers of their own, and a GPU
    can do without one where it has compiled before.

    Raises `CannotCompile`.
    """
    if not isinstance(job, TrainingJob) or not job.optim.compile or job.cluster.gpus_per_worker or read_ray_address():
        return
    if any(environment.get(name) == "1" for name in DISABLING):
        return
    missing = find_missing_compiler(environment=environment)
    if missing is not None:
        raise CannotCompile(f"optim.compile: {missing}")
