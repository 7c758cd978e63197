"""Variables of the environment that would change a job behind its file's back: dropped, or named.

The one place for this list; docs/operating.md has it as a table. What is not here is honoured as its program documents
it: `MLFLOW_TRACKING_USERNAME`, `MLFLOW_HTTP_REQUEST_TIMEOUT`, `RAY_ADDRESS`, `AWS_PROFILE`, `OMP_NUM_THREADS`, …
"""

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from corun_ray.config.credentials import mask_credentials


@dataclass(frozen=True)
class Variables:
    """Variables that are treated alike, and why."""

    names: tuple[str, ...]
    reason: str
    values: tuple[str, ...] | None = None
    """Only these values matter; None: all."""

    def find(self, environment: MutableMapping[str, str]) -> list[str]:
        """Return the names that are set."""
        found = []
        for name in self.names:
            value = environment.get(name)
            if value is not None and (self.values is None or value.lower() in self.values):
                found.append(name)
        return found


YES = ("1", "true", "yes", "on")
NO = ("0", "false", "no", "off")
TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

DROPPED = (
    Variables(("MLFLOW_RUN_ID",), "every job has an MLflow run of its own; --resume opens an earlier one again"),
    Variables(("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"), "tracking.experiment names the experiment"),
    Variables(("MLFLOW_ACTIVE_MODEL_ID",), "a job's metrics belong to its own run and models"),
    Variables(TORCHRUN, "cluster.workers says how many workers train; start the command once, not by torchrun"),
    Variables(("RAY_TRAIN_V2_ENABLED",), "corun_ray needs the Ray Train of this Ray, not the former one", NO),
    Variables(("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",), "files of weights are read as data, never as code"),
)
"""Variables that a job removes from its environment before Ray, MLflow or torch look at it."""

NAMED = (
    Variables(("MLFLOW_REGISTRY_URI",), "models are registered there, not where tracking.uri leads"),
    Variables(("MLFLOW_TRACKING_INSECURE_TLS",), "the certificate of MLflow's server is not checked", YES),
    Variables(("MLFLOW_S3_ENDPOINT_URL",), "MLflow's artifacts go to this store, whatever storage and data use"),
    Variables(("MLFLOW_S3_IGNORE_TLS",), "the certificate of MLflow's artifact store is not checked", YES),
    Variables(("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",), "no effect: Prometheus has the machines' metrics", YES),
    Variables(("CUDA_VISIBLE_DEVICES",), "this process, and a Ray that it starts, see these GPUs alone"),
    Variables(("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"), "optim.compile has no effect", YES),
    Variables(("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"), "changes the precision of sums on GPUs"),
    Variables(("RAY_TRAIN_CALLBACKS",), "Ray Train runs this code in the driver of every training"),
    Variables(("TUNE_MAX_PENDING_TRIALS_PG",), "limits the trials that start at once, beside tune.trials_at_once"),
    Variables(("RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE",), "nodes that are taken away use up cluster.max_failures", YES),
    Variables(("RAY_RUNTIME_ENV_HOOK",), "Ray lets this code change what it starts"),
)
"""Variables that stay, and of which a job tells, as they change what its file says."""


def drop_variables(prefix: str = "", environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Remove what must not reach Ray, MLflow or torch; return a line for each reason.

    Only variables whose names begin with `prefix`.
    """
    lines = []
    for variables in DROPPED:
        found = [name for name in variables.find(environment) if name.startswith(prefix)]
        if found:
            shown = ", ".join(f"{name}={mask_credentials(environment.pop(name))}" for name in found)
            lines.append(f"environment: {shown} is ignored: {variables.reason}")
    return lines


def name_variables(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Return a line for each reason why variables that stay change what a job does."""
    lines = []
    for variables in NAMED:
        found = variables.find(environment)
        if found:
            shown = ", ".join(f"{name}={mask_credentials(environment[name])}" for name in found)
            lines.append(f"environment: {shown}: {variables.reason}")
    return lines
