"""Define the schema of a job file: every key with its type, unit, range and default.

A job is an object of one of the classes in `KINDS`, chosen by its `kind`. A class has the keys that its kind uses.
The types of values are in `types`; `reference` lists the keys; `loading` reads YAML into these classes.
"""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from corun_ray.config.credentials import REFUSED, holds_credentials, mask_credentials
from corun_ray.config.s3_uri import find_s3_mistake
from corun_ray.config.tasks import DehazeSection, DepthSection, EvaluateSection, ServeSection, TuneSection
from corun_ray.config.training import (
    CoherenceSection,
    ColabatorDataSection,
    ColabatorLossSection,
    ColabatorOptimSection,
    ColabatorTrainSection,
    HazeSection,
    LossSection,
    NetworkSection,
    OptimSection,
    PoolSection,
    PretrainTrainSection,
    TrainingDataSection,
    TrainSection,
)
from corun_ray.config.types import (
    Count,
    Mismatch,
    Name,
    OneOrMore,
    OptionalText,
    Positive,
    Section,
    Strict,
    Text,
    Whole,
    Workers,
)
from corun_ray.core.choices import REFERENCE, REFERENCE_MODEL
from corun_ray.core.metrics.catalog import TRANSMISSION_METRICS, list_validation_metrics


class ClusterSection(Section):
    workers: Workers = Field((1, 1), description="training workers; [low, high]: as many as fit the cluster")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of a worker; 0: runs on the CPU")
    cpus_per_worker: Positive = Field(1.0, description="CPUs of a worker")
    data_cpus: OneOrMore = Field(1, description="CPUs that decode images")
    max_failures: Count = Field(3, ge=0, description="restarts before the job fails")
    resize_every_s: Positive = Field(60.0, description="seconds between checks whether an elastic job can grow")

    @property
    def min_workers(self) -> int:
        """The fewest workers that the job can run with."""
        return self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the job uses."""
        return self.workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during a run."""
        return self.min_workers < self.max_workers

    @property
    def workers_text(self) -> str:
        """The number of workers as text: `8` or `4 to 8`."""
        if self.is_elastic:
            return f"{self.min_workers} to {self.max_workers}"
        return str(self.max_workers)


with warnings.catch_warnings():
    # pydantic warns that `register` hides ABCMeta.register, which nothing calls on a job's section.
    warnings.filterwarnings("ignore", 'Field name "register"')

    class TrackingSection(Section):
        uri: str = Field("", description="URI of the MLflow server; empty: mlflow.db in the storage folder")
        experiment: Text = Field("corun", description="MLflow experiment")
        register: OptionalText = Field(None, description="name of the registered model; null: not registered")


def _define_section(description: str) -> Any:
    """Define a section that a file may omit.

    Where the section has required keys, these are reported as missing.
    """
    return Field({}, description=description)


def _find_texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text within a value, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _find_texts(part, f"{path}.{key}" if path else key)
    elif isinstance(value, tuple):
        for part in value:
            yield from _find_texts(part, path)


class Job(Strict):
    kind: str = Field(description="pretrain, colabator, tune, evaluate, dehaze, depth or serve")
    name: Name = Field(description="lower-case letters, digits and . _ -, starting with a letter or digit")
    seed: Whole = Field(0, ge=0, le=2**32 - 1, description="seed of all random numbers")
    storage: Text = Field("runs", description="folder or URI of checkpoints, label pool and reports")
    cluster: ClusterSection = _define_section("the cluster resources of the job")
    tracking: TrackingSection = _define_section("records in MLflow")

    @field_validator("tracking")
    @classmethod
    def _require_tracking_server(cls, tracking: TrackingSection, info: ValidationInfo) -> TrackingSection:
        # MLflow's database cannot be in a bucket.
        storage = info.data.get("storage", "")
        if not tracking.uri and "://" in storage:
            raise Mismatch("tracking.uri", f"needed because storage {storage} is not a folder")
        return tracking

    @model_validator(mode="after")
    def _refuse_credentials(self) -> "Job":
        for path, text in _find_texts(self.model_dump()):
            if holds_credentials(text):
                raise Mismatch(path, f"{mask_credentials(text)} {REFUSED}")
        return self

    @model_validator(mode="after")
    def _refuse_unreadable_keys(self) -> "Job":
        for path, text in _find_texts(self.model_dump()):
            mistake = find_s3_mistake(text)
            if mistake is not None:
                raise Mismatch(path, f"{text}: {mistake}")
        return self

    @property
    def whole_cluster(self) -> ClusterSection:
        """The resources that the job takes at any one time."""
        return self.cluster


class TrainingJob(Job):
    """The keys that pre-training and Colabator have in common."""

    data: TrainingDataSection = _define_section("images")
    haze: HazeSection = _define_section("the synthetic haze")
    network: NetworkSection = _define_section("the network")
    loss: LossSection = _define_section("the losses")
    optim: OptimSection = _define_section("the optimiser, AdamW")
    train: TrainSection = _define_section("the training loop")

    @model_validator(mode="after")
    def _check_mixup(self) -> "TrainingJob":
        # Batches of the beginning and of all later steps of a progressive training.
        batches = [self.train.batch_per_worker]
        if isinstance(self.train, PretrainTrainSection):
            batches += [step.batch_per_worker for step in self.train.progressive]

        if self.data.mixup and min(batches) < 2:
            raise Mismatch("data.mixup", "mixes the images of a batch, and batch_per_worker is 1")
        return self

    @model_validator(mode="after")
    def _check_transmission(self) -> "TrainingJob":
        # Only haze that is laid here has a transmission that is known, and a mixture of two hazes has none.
        if self.loss.transmission and self.data.paired is not None:
            raise Mismatch("loss.transmission", "needs data.clear: the haze of data.paired has no known transmission")
        if self.loss.transmission and self.data.mixup:
            raise Mismatch("loss.transmission", "not used together with data.mixup")
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> "TrainingJob":
        sections, metrics = self.data.list_validation_sections(), self.train.validation_metrics
        if metrics is not None and not sections:
            raise Mismatch("train.validation_metrics", f"{', '.join(metrics)}, but there is no data.validation")

        # A metric that needs a truth needs it of every set.
        for metric in metrics or ():
            for key, images in sections.items():
                part = "transmission" if metric in TRANSMISSION_METRICS else "clear"
                if list_validation_metrics()[metric].needs_truth and getattr(images, part) is None:
                    raise Mismatch("train.validation_metrics", f"{metric} needs {key}.{part}, which is missing")

        best = self.train.best
        if best is not None and best not in self.measured_metrics:
            gives = ", ".join(self.measured_metrics) or "nothing: there is no data.validation"
            raise Mismatch("train.best", f"{best} is not measured (validation gives {gives})")
        return self

    @property
    def measured_metrics(self) -> list[str]:
        """Names of all metrics that validation gives, such as `val/fade`."""
        measured = []
        for key, images in self.data.list_validation_sections().items():
            prefix = self.data.name_validation_set(key)
            measured += [f"{prefix}/{metric}" for metric in self.train.choose_metrics(images)]
        return measured


class PretrainJob(TrainingJob):
    kind: Literal["pretrain"]
    train: PretrainTrainSection = _define_section("the training loop")


class ColabatorKeys(TrainingJob):
    """The keys of a Colabator job, and of a search over such jobs."""

    data: ColabatorDataSection = _define_section("images")
    optim: ColabatorOptimSection = _define_section("the optimiser, AdamW")
    train: ColabatorTrainSection = _define_section("the training loop")
    loss: ColabatorLossSection = _define_section("the losses")
    coherence: CoherenceSection = _define_section("the scores of pseudo labels")
    pool: PoolSection = _define_section("the optimal label pool")

    @field_validator("coherence")
    @classmethod
    def _check_blocks_and_losses(cls, coherence: CoherenceSection, info: ValidationInfo) -> CoherenceSection:
        # A section that was refused is absent here; its own mistake is reported.
        data = info.data.get("data")
        if data and data.patch_px % coherence.block_px:
            text = f"{data.patch_px} is not a multiple of coherence.block_px ({coherence.block_px})"
            raise Mismatch("data.patch_px", text)

        cluster = info.data.get("cluster")
        if cluster and coherence.gpu and not cluster.gpus_per_worker:
            raise Mismatch("coherence.gpu", f"{', '.join(coherence.gpu)}, but cluster.gpus_per_worker is 0")

        # The loss of haze density needs a differentiable scorer.
        loss = info.data.get("loss")
        if loss and loss.haze_density_weight and coherence.clarity in ("fade", REFERENCE):
            text = f"not used with {coherence.clarity}; daclip, contrast and dark_channel have a gradient for it"
            raise Mismatch("loss.haze_density_weight", text)

        # The first candidates of such a job would be the reference itself.
        network = info.data.get("network")
        if network and network.init == REFERENCE_MODEL and coherence.clarity == REFERENCE:
            text = f"{REFERENCE} compares with {REFERENCE_MODEL}, where network.init starts"
            raise Mismatch("coherence.clarity", f"{text}: the first labels would never be replaced")
        return coherence


class ColabatorJob(ColabatorKeys):
    kind: Literal["colabator"]


class TuneJob(ColabatorKeys):
    kind: Literal["tune"]
    tune: TuneSection = _define_section("the search: keys that vary, and the comparison of trials")

    @property
    def whole_cluster(self) -> ClusterSection:
        """The resources of all trials that run at once."""
        trial = self.cluster
        trials = self.tune.trials_at_once or 1
        workers = (trial.min_workers * trials, trial.max_workers * trials)
        return trial.model_copy(update={"workers": workers, "data_cpus": trial.data_cpus * trials})


class EvaluateJob(Job):
    kind: Literal["evaluate"]
    evaluate: EvaluateSection = _define_section("the evaluation: models, images and metrics")


class DehazeJob(Job):
    kind: Literal["dehaze"]
    dehaze: DehazeSection = _define_section("the images to dehaze, and the model")


class DepthJob(Job):
    kind: Literal["depth"]
    depth: DepthSection = _define_section("the photographs whose depth is estimated, and the model")


class ServeJob(Job):
    kind: Literal["serve"]
    serve: ServeSection = _define_section("the served model, its address and its limits")

    @property
    def whole_cluster(self) -> ClusterSection:
        """The resources of all replicas."""
        section = self.serve
        return ClusterSection(
            workers=section.replicas,
            gpus_per_worker=section.gpus_per_replica,
            cpus_per_worker=section.cpus_per_replica,
        )


KINDS: dict[str, type[Job]] = {
    "pretrain": PretrainJob,
    "colabator": ColabatorJob,
    "tune": TuneJob,
    "evaluate": EvaluateJob,
    "dehaze": DehazeJob,
    "depth": DepthJob,
    "serve": ServeJob,
}
