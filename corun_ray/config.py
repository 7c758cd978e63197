"""The schema of a job file: every key with its type, unit, range and default.

A job is one of the classes in `KINDS`, chosen by its `kind`; a class has the keys that its kind uses.
`jobfile` reads YAML into these classes and puts every mistake into one plain line.
"""

import json
import warnings
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

# The names that `corun_ray.core.coherence` offers; kept here as well because that module needs torch.
Clarity = Literal["fade"]
Quality = Literal["clean", "unclipped"]
CLARITY_NAMES: tuple[str, ...] = get_args(Clarity)
QUALITY_NAMES: tuple[str, ...] = get_args(Quality)
Metric = Literal["psnr", "ssim", "fade"]
DepthKind = Literal["inverse", "metres"]
Combine = Literal["addition", "multiplication"]
Encoding = Literal["uint8", "float16", "float32"]

COUNT = "count"  # marks a number of things: out of range it is "too few", where a size is "too small"
LIMIT_WORDS = {
    "ge": "at least",
    "gt": "more than",
    "le": "at most",
    "lt": "less than",
    "multiple_of": "multiple of",
}


class Mismatch(ValueError):
    """Two sections that do not go together; `key` is the full path of the key to change."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def _whole(value: Any) -> Any:
    """Takes 5e3 for 5000, as people write step counts."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _low_first(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"[{pair[0]}, {pair[1]}] is in the wrong order (low first)")
    return pair


def _some_once(items: tuple[str, ...]) -> tuple[str, ...]:
    if not items:
        raise ValueError("empty")
    if len(set(items)) < len(items):
        raise ValueError(f"[{', '.join(items)}] names one twice")
    return items


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, COUNT]
OneOrMore = Annotated[Count, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
# Empty text counts as absent, so that `depth: ${DEPTH:-}` leaves the key out.
OptionalText = Annotated[Text | None, BeforeValidator(lambda value: None if value == "" else value)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_low_first)]
FractionRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_low_first)]
LearningRate = Annotated[float, Field(gt=0, le=1, description="learning rate at the first step")]
MinLearningRate = Annotated[
    float, Field(ge=0, description="learning rate at the schedule's end; lr: constant")
]
ScheduleSteps = Annotated[OneOrMore, Field(description="length of the cosine schedule, in steps")]
Steps = Annotated[OneOrMore, Field(description="number of training steps")]
Batch = Annotated[OneOrMore, Field(description="images of each kind, synthetic and real, in a worker's step")]
RandomResize = Annotated[bool, Field(description="resize clear images by a random factor before the crop")]


class Strict(BaseModel):
    """Frozen; refuses unknown keys and values of another type; checks its defaults as well."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class Section(Strict):
    @model_validator(mode="before")
    @classmethod
    def _nothing_below(cls, value: Any) -> Any:
        """A section with no key below it is null in YAML: it means the defaults."""
        return {} if value is None else value


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
    clarity: Clarity = Field("fade", description="scorer of haze density")
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
    models: dict[Name, Text] = Field(
        {}, description="models by name; empty: the hazy input alone is measured"
    )
    metrics: Annotated[tuple[Metric, ...], AfterValidator(_some_once)] = Field(
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


# The order in which a job's keys are listed and written; sections that a kind does not use are left out.
ORDER = (
    *("kind", "name", "seed", "storage", "data", "haze", "network", "coherence", "pool"),
    *("loss", "optim", "train", "evaluate", "cluster", "tracking"),
)


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of a job or section by its full path; a section comes before its keys."""
    found = {}
    for name in sorted(model.model_fields, key=ORDER.index) if issubclass(model, Job) else model.model_fields:
        field = model.model_fields[name]
        found[prefix + name] = field
        if section := section_of(field):
            found |= keys(section, f"{prefix}{name}.")
    return found


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section below a key, None for a key that holds a value."""
    types = (field.annotation, *get_args(field.annotation))
    return next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)


def limits(field: FieldInfo) -> dict[str, float]:
    """The range of a number, its keys those of `LIMIT_WORDS`."""
    return {word: getattr(c, word) for word in LIMIT_WORDS for c in field.metadata if hasattr(c, word)}


def reference() -> str:
    """A plain-text list of every key with its default (by kind), type, range and meaning."""
    by_kind = {kind: keys(job) for kind, job in KINDS.items()}
    lines: list[str] = []
    said = ""
    for path, field in (keys(ColabatorJob) | keys(EvaluateJob) | keys(Job)).items():
        users = [kind for kind in KINDS if path in by_kind[kind]]
        only = f" ({', '.join(users)} only)" if len(users) < len(KINDS) else ""
        if section_of(field) and "." not in path:
            lines += ["", f"{path}: {field.description}{only}"]
            said = only
            continue
        defaults = {kind: _default(path, by_kind[kind]) for kind in users}
        same = len(set(defaults.values())) == 1
        default = defaults[users[0]] if same else ", ".join(f"{d} in {kind}" for kind, d in defaults.items())
        meaning = f"{field.description}{only if only != said else ''}"
        lines += [f"  {path:<26} {default}", f"      {_type(field.annotation)}{_range(field)}; {meaning}"]
    return "\n".join(lines) + "\n"


def _default(path: str, fields: dict[str, FieldInfo]) -> str:
    if fields[path].is_required():
        return "required"
    section = path.rpartition(".")[0]
    siblings = {p.rpartition(".")[2]: f.default for p, f in fields.items() if p.rpartition(".")[0] == section}
    value = fields[path].get_default(call_default_factory=True, validated_data=siblings)
    return value if value and isinstance(value, str) else json.dumps(value)


def _type(annotation: Any) -> str:
    inner = get_args(annotation)
    match get_origin(annotation):
        case None:
            words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
            return words.get(annotation, "mapping")
        case origin if origin is Literal:
            return " | ".join(inner)
        case origin if origin is tuple:
            return f"list of {_type(inner[0])}" if inner[1] is ... else "[low, high]"
        case origin if origin is dict:
            return "mapping"
        case _:  # X | None
            return _type(inner[0])


def _range(field: FieldInfo) -> str:
    return "".join(f", {LIMIT_WORDS[word]} {limit:.10g}" for word, limit in limits(field).items())
