"""Define the sections `tune`, `evaluate`, `serve`, `dehaze` and `depth` of a job file."""

import difflib
import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from corun_ray.config.pairing import TruthSection
from corun_ray.config.types import (
    Count,
    Mismatch,
    Name,
    OneOrMore,
    OptionalCount,
    OptionalText,
    Positive,
    Section,
    Text,
    Whole,
    Workers,
    check_distinct,
)
from corun_ray.core.choices import DepthKind, DetectorName
from corun_ray.core.metrics.catalog import OWN_METRICS, choose_mode, list_metrics

Baseline = Literal["hazy", "untrained", "dark_channel"]
PATH = re.compile(r"/|(/[A-Za-z0-9._-]+)+")
"""A path of HTTP: `/` or `/dehazing`."""
CLASS_NAME = re.compile(r"[\w.-]+( [\w.-]+)*", re.ASCII)
"""A class of objects: `car` or `traffic light`."""


# --- Search ---


class RangeSection(Section):
    """Numbers between two ends; whole numbers where both ends are whole."""

    low: int | float = Field(description="the smallest value")
    high: int | float = Field(description="the largest value")
    log: bool = Field(False, description="draw evenly in the logarithm")

    @model_validator(mode="after")
    def _check_ends(self) -> "RangeSection":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not less than high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low} has no logarithm")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the range has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)


def _flatten_search(search: Any, prefix: str = "") -> Any:
    """Convert `network: {stages: [2, 3]}` to `network.stages: [2, 3]`."""
    if not isinstance(search, dict):
        return search

    # A mapping is a range if it has any key of a range, else a section.
    flat: dict[Any, Any] = {}
    for key, choice in search.items():
        path = f"{prefix}{key}"
        is_section = isinstance(choice, dict) and not choice.keys() & RangeSection.model_fields.keys()
        if is_section:
            flat |= _flatten_search(choice, f"{path}.")
        else:
            flat[path] = choice
    return flat


def _check_search(search: dict[str, Any]) -> dict[str, Any]:
    if not search:
        raise ValueError("empty (a mapping such as network.stages: [2, 3, 4])")
    for key, choice in search.items():
        if isinstance(choice, tuple) and not choice:
            raise ValueError(f"{key} has nothing to choose from")
    return search


Choice = tuple[Any, ...] | RangeSection
# The tags name the two forms in pydantic's errors.
_Choice = Annotated[
    Annotated[tuple[Any, ...], Tag("[list]")] | Annotated[RangeSection, Tag("[range]")],
    Discriminator(lambda choice: "[range]" if isinstance(choice, dict | RangeSection) else "[list]"),
]
Search = Annotated[dict[str, _Choice], BeforeValidator(_flatten_search), AfterValidator(_check_search)]


class TuneSection(Section):
    search: Search = Field(description="key: [values] or key: {low, high, log}, for any key of a colabator job")
    metric: Text = Field("val/fade", description="validation metric that compares trials")
    mode: Literal["min", "max"] = Field(
        default_factory=lambda earlier: choose_mode(earlier["metric"]),
        description="min: a lower metric is better; max: a higher one; default: as the metric is",
    )
    samples: OneOrMore = Field(1, description="draws from the ranges, each with every combination of the lists")
    trials_at_once: OptionalCount = Field(None, ge=1, description="trials at a time; null: as many as fit the cluster")
    scheduler: Literal["asha", "all"] = Field("asha", description="asha: end trials that fall behind; all: end none")
    grace_steps: OptionalCount = Field(
        None, ge=1, description="steps before asha may end a trial; null: a quarter of train.steps"
    )
    reduction: Count = Field(3, ge=2, description="asha continues one of this many trials at each rung")
    pretrain_steps: Count = Field(0, ge=0, description="steps of pre-training before each trial; 0: none")

    @property
    def num_trials(self) -> int:
        """Number of trials."""
        lists = [choice for choice in self.search.values() if isinstance(choice, tuple)]
        return self.samples * math.prod(map(len, lists))


# --- Evaluation ---


def _check_metric(name: str) -> str:
    # Suggest a name that is spelt alike.
    if name not in list_metrics():
        close = difflib.get_close_matches(name, list_metrics(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f'"{name}" is neither of {", ".join(OWN_METRICS)} nor a metric of pyiqa for images{hint}')
    return name


def _check_distinct_if_any(items: tuple[str, ...]) -> tuple[str, ...]:
    return check_distinct(items) if items else items


def _check_class_names(names: tuple[str, ...]) -> tuple[str, ...]:
    # They become names of MLflow's metrics.
    for name in names:
        if not CLASS_NAME.fullmatch(name):
            raise ValueError(f'"{name}" is not a name of letters, digits, blanks and . _ -')
    return check_distinct(names)


ClassNames = Annotated[tuple[Text, ...], AfterValidator(_check_class_names)] | None


class EvaluateSection(TruthSection):
    models: dict[Name, Text] = Field(
        {},
        description="models by name, or folders of another method's results, paired by stem; empty: only the baselines",
    )
    baselines: Annotated[tuple[Baseline, ...], AfterValidator(_check_distinct_if_any)] = Field(
        get_args(Baseline),
        description="hazy: the unchanged input; untrained: CORUN's closed form; dark_channel: the dark channel prior",
    )
    metrics: Annotated[tuple[Annotated[str, AfterValidator(_check_metric)], ...], AfterValidator(check_distinct)] = (
        Field(
            default_factory=lambda earlier: tuple(OWN_METRICS) if earlier["clear"] else ("fade",),
            description="psnr and ssim (RGB, range 1, Gaussian window of 11 px, sigma 1.5), fade or a metric of pyiqa "
            "(musiq, ...); without clear: those that need no truth",
        )
    )
    weights: OptionalText = Field(
        None, description="folder or URI of the weights of pyiqa and of the detector (see corun-ray weights)"
    )
    detector: DetectorName | None = Field(
        None, description="detector of torchvision that looks for boxes in every picture; null: none"
    )
    detector_file: OptionalText = Field(
        None, description="its state dict within weights; null: torchvision's own file, trained on COCO"
    )
    detector_classes: ClassNames = Field(
        None, description="classes of detector_file in the order of their numbers 1, 2, ...; null: COCO's"
    )
    boxes: OptionalText = Field(
        None, description="true boxes for the detector: folder or URI of VOC's .xml, paired by stem, or COCO's .json"
    )
    box_classes: ClassNames = Field(None, description="classes of the boxes to measure; null: all that there are")
    self_ensemble: bool = Field(False, description="models restore by the mean over eight flips and turns")
    against: Name | None = Field(
        None, description="model or baseline that the others are compared with; null: the first model"
    )

    @field_validator("metrics")
    @classmethod
    def _check_truth(cls, metrics: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        needing = [metric for metric in metrics if list_metrics()[metric].needs_truth]
        if needing and info.data.get("clear", "") is None:
            raise ValueError(f"{' and '.join(needing)} cannot be measured without evaluate.clear")
        return metrics

    @model_validator(mode="after")
    def _check_names(self) -> "EvaluateSection":
        for name in get_args(Baseline):
            if name in self.models:
                raise Mismatch(f"evaluate.models.{name}", "the name of a baseline; a model needs another name")
        if not self.names:
            raise Mismatch("evaluate.models", "missing (models by name, or evaluate.baselines)")
        if self.against is not None and self.against not in self.names:
            raise Mismatch("evaluate.against", f'"{self.against}" is not measured ({", ".join(self.names)})')
        return self

    @model_validator(mode="after")
    def _check_detector(self) -> "EvaluateSection":
        if self.detector is None:
            for key in ("detector_file", "detector_classes", "boxes", "box_classes"):
                if getattr(self, key) is not None:
                    raise Mismatch(f"evaluate.{key}", "only used together with evaluate.detector")
            return self

        if self.boxes is None:
            raise Mismatch("evaluate.boxes", "missing (a detector needs true boxes: VOC's folder or COCO's .json)")
        if self.weights is None:
            raise Mismatch("evaluate.weights", f"missing (detector {self.detector} needs its weights)")
        if self.detector_classes is not None and self.detector_file is None:
            raise Mismatch("evaluate.detector_file", "missing (torchvision's own file has COCO's classes)")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all baselines and models, baselines first."""
        return (*self.baselines, *self.models)

    @property
    def reference(self) -> str | None:
        """Name that the others are compared with, if any."""
        return self.against or next(iter(self.models), None)


# --- Serving ---


def _check_path(path: str) -> str:
    if not PATH.fullmatch(path):
        raise ValueError(f'"{path}" is not a path such as / or /dehazing (letters, digits, . _ -, no / at the end)')
    return path


class ServeSection(Section):
    model: Text = Field(description="MLflow URI, checkpoint, plain model folder, .pth or corun-small")
    host: Text = Field("127.0.0.1", description="address to listen on; 0.0.0.0: all addresses, without authentication")
    port: Whole = Field(8000, ge=1, le=65535, description="TCP port of HTTP")
    path: Annotated[str, AfterValidator(_check_path)] = Field(
        "/", description="path prefix, for several applications on one cluster"
    )
    replicas: Workers = Field((1, 1), description="copies of the model; [low, high]: as many as the requests need")
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs of a replica; 0.5: half of a GPU; 0: runs on the CPU")
    cpus_per_replica: Positive = Field(1.0, description="CPUs of a replica, and number of its threads")
    max_batch: OneOrMore = Field(4, description="most images of equal size in one batch")
    batch_wait_s: float = Field(0.01, ge=0, description="seconds that an image waits for a batch to fill")
    max_upload_mib: OneOrMore = Field(32, description="largest accepted file")
    max_megapixels: Positive = Field(25.0, description="largest accepted image")
    max_queued: OneOrMore = Field(32, description="most waiting requests; others are refused with HTTP status 503")
    timeout_s: Positive = Field(300.0, description="seconds until a request fails")
    memory_mib: OptionalCount = Field(
        None,
        ge=64,
        description="memory for one batch; larger images are processed in parts; null: 2816, or 3/4 of the GPU share",
    )

    @field_validator("gpus_per_replica")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} is neither a share of one GPU nor a whole number of GPUs")
        return gpus


# --- Dehazing ---


class DehazeSection(Section):
    input: Text = Field(description="folder or URI of hazy images")
    output: Text = Field(description="folder or URI of the restored images, which keep their names and folders")
    model: Text = Field(description="MLflow URI, checkpoint, plain model folder, .pth or corun-small")
    format: Literal["keep", "png", "jpg", "tif", "webp"] = Field("keep", description="file format; keep: as the input")
    transmission: bool = Field(False, description="also write NAME.transmission.png, 16-bit grey; 65535 is clear air")
    stages: bool = Field(False, description="also write NAME.stages.png, the result of every stage; corun only")
    self_ensemble: bool = Field(False, description="mean over eight flips and turns of the image; 8 times as long")
    memory_mib: OptionalCount = Field(
        None,
        ge=64,
        description="memory for one image; larger ones are processed in parts; null: 2816, or 3/4 of the GPU's memory",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> "DehazeSection":
        if self.stages and self.self_ensemble:
            raise Mismatch("dehaze.stages", "not with self_ensemble: stages are those of one restoration, not of eight")
        return self


# --- Depth ---


class DepthSection(Section):
    input: Text = Field(description="folder or URI of clear photographs")
    output: Text = Field(description="folder or URI of their depth maps, which have the photographs' names and folders")
    weights: Text = Field(description="folder or URI of weights, which holds the model (see corun-ray weights)")
    model: Text = Field(
        "depth-anything-v2-small", description="depth estimator of transformers: its folder below weights"
    )
    depth_kind: DepthKind | None = Field(None, description="what the model predicts; null: as its type tells")
    format: Literal["npy", "png"] = Field("npy", description="npy: float16; png: 16-bit grey")
