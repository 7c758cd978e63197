"""The schema of a job file: every key with its type, unit, range and default.

A job is one of the classes in `KINDS`, chosen by its `kind`; a class has the keys that its kind uses.
`jobvalues` has the types of values, `jobkeys` lists the keys, `jobfile` reads YAML into these classes.
"""

import warnings
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from corun_ray.jobvalues import (
    Batch,
    Count,
    Fraction,
    FractionRange,
    LearningRate,
    MinLearningRate,
    Mismatch,
    Name,
    OneOrMore,
    OptionalText,
    Positive,
    PositiveRange,
    RandomResize,
    ScheduleSteps,
    Section,
    Steps,
    Strict,
    Text,
    Whole,
    some_once,
)

# The names that `corun_ray.core.coherence` offers; kept here as well because that module needs torch.
Clarity = Literal["contrast", "fade", "dark_channel"]
Quality = Literal["clean", "unclipped"]
CLARITY_NAMES: tuple[str, ...] = get_args(Clarity)
QUALITY_NAMES: tuple[str, ...] = get_args(Quality)
Metric = Literal["psnr", "ssim", "fade"]
DepthKind = Literal["inverse", "metres"]
Combine = Literal["addition", "multiplication"]
Encoding = Literal["uint8", "float16", "float32"]


class Validation(Section):
    hazy: Text = Field(description="a folder or URI of hazy images")
    clear: OptionalText = Field(None, description="a folder or URI of their clear truth, paired by stem")


class TrainingData(Section):
    clear: Text = Field(description="a folder or URI of clear images")
    depth: OptionalText = Field(None, description="a folder or URI of their depth; null: a procedural depth")
    depth_kind: DepthKind = Field("inverse", description="metres: far is large and 0 is no reading")
    validation: Validation | None = Field(None, description="held-out images")
    patch_px: Whole = Field(288, ge=32, multiple_of=16, description="side of a training patch, in pixels")
    random_resize: RandomResize = False
    max_bad_fraction: Fraction = Field(0.01, description="fraction of unusable images tolerated")


class ColabatorData(TrainingData):
    hazy: Text = Field(description="a folder or URI of real hazy images")
    random_resize: RandomResize = True


class Haze(Section):
    beta: PositiveRange = Field((0.2, 2.8), description="scattering coefficient, each more than 0")
    airlight: FractionRange = Field((0.25, 1.0), description="brightness of the airlight, each in 0 to 1")
    airlight_tint: float = Field(0.025, ge=0, description="largest deviation of a colour channel from it")


class Network(Section):
    type: Literal["corun"] = Field("corun", description="architecture")
    stages: Count = Field(4, ge=2, le=16, description="number of unfolding stages")
    width: Count = Field(30, ge=4, multiple_of=2, description="number of feature channels")
    init: OptionalText = Field(None, description="model to start from (MLflow URI, checkpoint, .pth)")


class Coherence(Section):
    clarity: Clarity = Field("contrast", description="scorer of haze density")
    quality: Quality = Field("clean", description="scorer of image quality")
    block_px: Whole = Field(32, ge=8, description="side of a block of the trust map, in pixels")
    combine: Combine = Field("addition", description="how clarity and quality become one weight")


class Pool(Section):
    shards: Count = Field(1, ge=1, le=1, description="number of actors that share the index")
    encoding: Encoding = Field("uint8", description="number type in which a label is kept")


class Loss(Section):
    perceptual: Literal["none"] = Field("none", description="network of the perceptual loss")


class Optim(Section):
    lr: LearningRate = 1e-4
    min_lr: MinLearningRate = Field(default_factory=lambda earlier: earlier["lr"])
    schedule_steps: ScheduleSteps = 30_000
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights (the teacher) per step")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the network")
    compile: bool = Field(False, description="compile the network with torch.compile")

    @field_validator("min_lr")
    @classmethod
    def _not_above_lr(cls, min_lr: float, info: ValidationInfo) -> float:
        if min_lr > info.data.get("lr", min_lr):
            raise ValueError(f"{min_lr} is more than optim.lr ({info.data['lr']})")
        return min_lr


class ColabatorOptim(Optim):
    lr: LearningRate = 5e-5
    min_lr: MinLearningRate = Field(default_factory=lambda earlier: min(1e-6, earlier["lr"]))
    schedule_steps: ScheduleSteps = 50_000


class Train(Section):
    steps: Steps = 30_000
    batch_per_worker: Batch = 2
    log_every: OneOrMore = Field(50, description="steps between two lines of metrics")
    checkpoint_every: OneOrMore = Field(500, description="steps between two checkpoints")
    validate_every: OneOrMore = Field(500, description="steps between two validations")
    keep_checkpoints: OneOrMore = Field(2, description="number of checkpoints kept")
    validation_images: OneOrMore = Field(8, description="number of pictures in the validation grid")


class ColabatorTrain(Train):
    steps: Steps = 5_000
    batch_per_worker: Batch = 1


class Cluster(Section):
    workers: OneOrMore = Field(1, description="number of training workers")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of a worker; 0 runs on the CPU")
    cpus_per_worker: Positive = Field(1.0, description="CPUs of a worker")
    data_cpus: OneOrMore = Field(1, description="CPUs that decode images")
    max_failures: Count = Field(3, ge=0, description="restarts before the job fails")


with warnings.catch_warnings():
    # pydantic warns that `register` hides ABCMeta.register, which nothing calls on a job's section.
    warnings.filterwarnings("ignore", 'Field name "register"')

    class Tracking(Section):
        uri: str = Field("", description="MLflow server; empty: mlflow.db in the storage folder")
        experiment: Text = Field("corun", description="MLflow experiment")
        register: OptionalText = Field(None, description="registered model's name; null: not registered")


class Evaluate(Section):
    hazy: Text = Field(description="a folder or URI of hazy images")
    clear: OptionalText = Field(None, description="a folder or URI of their clear truth, paired by stem")
    models: dict[Name, Text] = Field({}, description="models by name; empty: the hazy input alone is measured")
    metrics: Annotated[tuple[Metric, ...], AfterValidator(some_once)] = Field(
        default_factory=lambda earlier: get_args(Metric) if earlier["clear"] else ("fade",),
        description="psnr and ssim need clear; with it, all three are the default",
    )

    @field_validator("metrics")
    @classmethod
    def _truth_for_references(cls, metrics: tuple[Metric, ...], info: ValidationInfo) -> tuple[Metric, ...]:
        needing = [metric for metric in metrics if metric != "fade"]
        if needing and info.data.get("clear", "") is None:
            raise ValueError(f"{' and '.join(needing)} cannot be measured without evaluate.clear")
        return metrics


def _section(description: str) -> Any:
    """A section that may be left out: its own keys say what is missing then."""
    return Field({}, description=description)


class Job(Strict):
    kind: str = Field(description="pretrain, colabator or evaluate")
    name: Name = Field(description="lower-case letters, digits, . _ - and no . _ - in front")
    seed: Whole = Field(0, ge=0, le=2**32 - 1, description="seed of everything random")
    storage: Text = Field("runs", description="a folder or URI for checkpoints, label pool and reports")
    cluster: Cluster = _section("where it runs")
    tracking: Tracking = _section("what MLflow records")

    @field_validator("tracking")
    @classmethod
    def _somewhere_to_track(cls, tracking: Tracking, info: ValidationInfo) -> Tracking:
        storage = info.data.get("storage", "")
        if not tracking.uri and "://" in storage:
            raise Mismatch("tracking.uri", f"needed because storage {storage} is not a folder")
        return tracking


class TrainingJob(Job):
    """What pre-training and Colabator have in common."""

    data: TrainingData = _section("images")
    haze: Haze = _section("the haze that is synthesised")
    network: Network = _section("the network")
    loss: Loss = _section("the loss")
    optim: Optim = _section("the optimiser, AdamW")
    train: Train = _section("the training loop")


class PretrainJob(TrainingJob):
    kind: Literal["pretrain"]


class ColabatorJob(TrainingJob):
    kind: Literal["colabator"]
    data: ColabatorData = _section("images")
    optim: ColabatorOptim = _section("the optimiser, AdamW")
    train: ColabatorTrain = _section("the training loop")
    coherence: Coherence = _section("how a pseudo label is scored")
    pool: Pool = _section("the optimal label pool")

    @field_validator("coherence")
    @classmethod
    def _whole_blocks(cls, coherence: Coherence, info: ValidationInfo) -> Coherence:
        data = info.data.get("data")
        if data and data.patch_px % coherence.block_px:
            text = f"{data.patch_px} is not a multiple of coherence.block_px ({coherence.block_px})"
            raise Mismatch("data.patch_px", text)
        return coherence


class EvaluateJob(Job):
    kind: Literal["evaluate"]
    evaluate: Evaluate = _section("what is measured, and of which models")


KINDS: dict[str, type[Job]] = {"pretrain": PretrainJob, "colabator": ColabatorJob, "evaluate": EvaluateJob}
