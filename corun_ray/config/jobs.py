"""The schema of a job file: every key with its type, unit, range and default.

A job is one of the classes in `KINDS`, chosen by its `kind`; a class has the keys that its kind uses.
`jobvalues` has the types of values, `jobkeys` lists the keys, `jobfile` reads YAML into these classes.
"""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from corun_ray.config.credentials import REFUSED, holds_credentials, mask_credentials
from corun_ray.config.tasks import DehazeSection, EvaluateSection, ServeSection, TuneSection
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


class ClusterSection(Section):
    workers: Workers = Field((1, 1), description="training workers; [low, high]: as many as there is room for")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of a worker; 0 runs on the CPU")
    cpus_per_worker: Positive = Field(1.0, description="CPUs of a worker")
    data_cpus: OneOrMore = Field(1, description="CPUs that decode images")
    max_failures: Count = Field(3, ge=0, description="restarts before the job fails")
    resize_every_s: Positive = Field(60.0, description="seconds between two looks whether an elastic job can grow")

    @property
    def min_workers(self) -> int:
        """As many must there be."""
        return self.workers[0]

    @property
    def max_workers(self) -> int:
        """More are never used."""
        return self.workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change in a run."""
        return self.min_workers < self.max_workers

    @property
    def workers_text(self) -> str:
        """For people: `8` or `4 to 8`."""
        return f"{self.min_workers} to {self.max_workers}" if self.is_elastic else str(self.max_workers)


with warnings.catch_warnings():
    # pydantic warns that `register` hides ABCMeta.register, which nothing calls on a job's section.
    warnings.filterwarnings("ignore", 'Field name "register"')

    class TrackingSection(Section):
        uri: str = Field("", description="MLflow server; empty: mlflow.db in the storage folder")
        experiment: Text = Field("corun", description="MLflow experiment")
        register: OptionalText = Field(None, description="registered model's name; null: not registered")


def _section(description: str) -> Any:
    """A section that may be left out: its own keys say what is missing then."""
    return Field({}, description=description)


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text within a value, after the path of its key."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(part, f"{path}.{key}" if path else key)
    elif isinstance(value, tuple):
        for part in value:
            yield from _texts(part, path)


class Job(Strict):
    kind: str = Field(description="pretrain, colabator, tune, evaluate, dehaze or serve")
    name: Name = Field(description="lower-case letters, digits, . _ - and no . _ - in front")
    seed: Whole = Field(0, ge=0, le=2**32 - 1, description="seed of everything random")
    storage: Text = Field("runs", description="a folder or URI for checkpoints, label pool and reports")
    cluster: ClusterSection = _section("where it runs")
    tracking: TrackingSection = _section("what MLflow records")

    @field_validator("tracking")
    @classmethod
    def _somewhere_to_track(cls, tracking: TrackingSection, info: ValidationInfo) -> TrackingSection:
        storage = info.data.get("storage", "")
        if not tracking.uri and "://" in storage:
            raise Mismatch("tracking.uri", f"needed because storage {storage} is not a folder")
        return tracking

    @model_validator(mode="after")
    def _no_credentials(self) -> "Job":
        for path, text in _texts(self.model_dump()):
            if holds_credentials(text):
                raise Mismatch(path, f"{mask_credentials(text)} {REFUSED}")
        return self

    @property
    def whole_cluster(self) -> ClusterSection:
        """What it takes at any one time."""
        return self.cluster


class TrainingJob(Job):
    """What pre-training and Colabator have in common."""

    data: TrainingDataSection = _section("images")
    haze: HazeSection = _section("the haze that is synthesised")
    network: NetworkSection = _section("the network")
    loss: LossSection = _section("the losses")
    optim: OptimSection = _section("the optimiser, AdamW")
    train: TrainSection = _section("the training loop")

    @model_validator(mode="after")
    def _mixup_needs_a_batch(self) -> "TrainingJob":
        later = self.train.progressive if isinstance(self.train, PretrainTrainSection) else ()
        if self.data.mixup and min([self.train.batch_per_worker, *(phase.batch_per_worker for phase in later)]) < 2:
            raise Mismatch("data.mixup", "mixes the images of a batch, and batch_per_worker is 1")
        return self


class PretrainJob(TrainingJob):
    kind: Literal["pretrain"]
    train: PretrainTrainSection = _section("the training loop")


class ColabatorKeys(TrainingJob):
    """The keys of a Colabator job, and of a search over such jobs."""

    data: ColabatorDataSection = _section("images")
    optim: ColabatorOptimSection = _section("the optimiser, AdamW")
    train: ColabatorTrainSection = _section("the training loop")
    loss: ColabatorLossSection = _section("the losses")
    coherence: CoherenceSection = _section("how a pseudo label is scored")
    pool: PoolSection = _section("the optimal label pool")

    @field_validator("coherence")
    @classmethod
    def _whole_blocks(cls, coherence: CoherenceSection, info: ValidationInfo) -> CoherenceSection:
        data = info.data.get("data")
        if data and data.patch_px % coherence.block_px:
            text = f"{data.patch_px} is not a multiple of coherence.block_px ({coherence.block_px})"
            raise Mismatch("data.patch_px", text)
        loss = info.data.get("loss")
        if loss and loss.haze_density_weight and coherence.clarity == "fade":
            raise Mismatch("loss.haze_density_weight", "fade has no gradient; daclip, contrast and dark_channel do")
        return coherence


class ColabatorJob(ColabatorKeys):
    kind: Literal["colabator"]


class TuneJob(ColabatorKeys):
    kind: Literal["tune"]
    tune: TuneSection = _section("the search: which keys vary, and how trials are judged")

    @property
    def whole_cluster(self) -> ClusterSection:
        """What all trials that run at once take."""
        one, trials = self.cluster, self.tune.trials_at_once or 1
        sizes = {"workers": tuple(n * trials for n in one.workers), "data_cpus": one.data_cpus * trials}
        return one.model_copy(update=sizes)


class EvaluateJob(Job):
    kind: Literal["evaluate"]
    evaluate: EvaluateSection = _section("what is measured, and of which models")


class DehazeJob(Job):
    kind: Literal["dehaze"]
    dehaze: DehazeSection = _section("which images are dehazed, by which model")


class ServeJob(Job):
    kind: Literal["serve"]
    serve: ServeSection = _section("which model answers requests, where, and within which bounds")

    @property
    def whole_cluster(self) -> ClusterSection:
        """What all replicas take."""
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
    "serve": ServeJob,
}
