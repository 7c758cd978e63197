"""The `tune` section of a job file: which keys vary and over what, and how trials are judged.

The `evaluate` section of a job file: what is measured, of which models, on which images.

The `serve` section of a job file: which model answers, where, with how many replicas, within which bounds.

The `dehaze` section of a job file: which images, by which model, to where."""

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
from corun_ray.core.metrics.catalog import OWN_METRICS, list_metrics


class RangeSection(Section):
    """Numbers between two ends; whole ones where both ends are."""

    low: int | float = Field(description="the smallest value")
    high: int | float = Field(description="the largest value")
    log: bool = Field(False, description="evenly spread in the logarithm")

    @model_validator(mode="after")
    def _low_first(self) -> "RangeSection":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} is not less than high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low} has no logarithm")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)


def _flat(search: Any, prefix: str = "") -> Any:
    """Takes `network: {stages: [2, 3]}` for `network.stages: [2, 3]`."""
    if not isinstance(search, dict):
        return search
    flat: dict[Any, Any] = {}
    for key, choice in search.items():
        is_section = isinstance(choice, dict) and not choice.keys() & RangeSection.model_fields.keys()
        flat |= _flat(choice, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": choice}
    return flat


def _not_empty(search: dict[str, Any]) -> dict[str, Any]:
    if not search:
        raise ValueError("empty (a mapping such as network.stages: [2, 3, 4])")
    if lone := [key for key, choice in search.items() if isinstance(choice, tuple) and not choice]:
        raise ValueError(f"{lone[0]} has nothing to choose from")
    return search


Choice = tuple[Any, ...] | RangeSection
_Choice = Annotated[
    Annotated[tuple[Any, ...], Tag("[list]")] | Annotated[RangeSection, Tag("[range]")],
    Discriminator(lambda choice: "[range]" if isinstance(choice, dict | RangeSection) else "[list]"),
]
Search = Annotated[dict[str, _Choice], BeforeValidator(_flat), AfterValidator(_not_empty)]


class TuneSection(Section):
    search: Search = Field(description="key: [values], or key: {low, high, log}, for any key of a colabator job")
    metric: Text = Field("val/fade", description="validation metric by which trials are compared")
    mode: Literal["min", "max"] = Field("min", description="whether less or more of it is better")
    samples: OneOrMore = Field(1, description="draws from the ranges, each with every combination of the lists")
    trials_at_once: OptionalCount = Field(None, ge=1, description="trials at a time; null: as many as fit")
    scheduler: Literal["asha", "all"] = Field("asha", description="asha ends trials that fall behind; all: none")
    grace_steps: OptionalCount = Field(
        None, ge=1, description="steps before asha may end a trial; null: a quarter of them"
    )
    reduction: Count = Field(3, ge=2, description="of so many trials, asha lets one go on at each rung")
    pretrain_steps: Count = Field(0, ge=0, description="steps of pre-training before each trial's own; 0: none")

    @property
    def num_trials(self) -> int:
        """How many trials there will be."""
        return self.samples * math.prod(len(choice) for choice in self.search.values() if isinstance(choice, tuple))


Baseline = Literal["hazy", "dark_channel"]


def _known_metric(name: str) -> str:
    if name not in list_metrics():
        close = difflib.get_close_matches(name, list_metrics(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f'"{name}" is neither of {", ".join(OWN_METRICS)} nor a metric of pyiqa for images{hint}')
    return name


def _some_once_if_any(items: tuple[str, ...]) -> tuple[str, ...]:
    return check_distinct(items) if items else items


class EvaluateSection(Section):
    hazy: Text = Field(description="a folder or URI of hazy images")
    clear: OptionalText = Field(None, description="a folder or URI of their clear truth, paired by stem")
    models: dict[Name, Text] = Field({}, description="models by name; empty: the baselines alone are measured")
    baselines: Annotated[tuple[Baseline, ...], AfterValidator(_some_once_if_any)] = Field(
        get_args(Baseline), description="hazy: the input as it is; dark_channel: dehazed by the dark channel prior"
    )
    metrics: Annotated[tuple[Annotated[str, AfterValidator(_known_metric)], ...], AfterValidator(check_distinct)] = (
        Field(
            default_factory=lambda earlier: tuple(OWN_METRICS) if earlier["clear"] else ("fade",),
            description="psnr, ssim, fade or a metric of pyiqa (musiq, ...); without clear: those that need no truth",
        )
    )
    weights: OptionalText = Field(None, description="a folder or URI of pyiqa's weights (see corun-ray weights)")
    against: Name | None = Field(
        None, description="the model or baseline that the others are compared with; null: the first model"
    )

    @field_validator("metrics")
    @classmethod
    def _truth_for_references(cls, metrics: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        needing = [metric for metric in metrics if list_metrics()[metric].needs_truth]
        if needing and info.data.get("clear", "") is None:
            raise ValueError(f"{' and '.join(needing)} cannot be measured without evaluate.clear")
        return metrics

    @model_validator(mode="after")
    def _someone_to_measure(self) -> "EvaluateSection":
        if taken := [name for name in get_args(Baseline) if name in self.models]:
            raise Mismatch(f"evaluate.models.{taken[0]}", "the name of a baseline; a model needs another")
        if not self.names:
            raise Mismatch("evaluate.models", "missing (models by name, or evaluate.baselines)")
        if self.against is not None and self.against not in self.names:
            raise Mismatch("evaluate.against", f'"{self.against}" is not measured ({", ".join(self.names)})')
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Whatever is measured: baselines first."""
        return (*self.baselines, *self.models)

    @property
    def reference(self) -> str | None:
        """What the others are compared with; None where there is nothing to compare."""
        return self.against or next(iter(self.models), None)


PATH = re.compile(r"/|(/[A-Za-z0-9._-]+)+")


def _is_path(path: str) -> str:
    if not PATH.fullmatch(path):
        raise ValueError(f'"{path}" is not a path such as / or /dehazing (letters, digits, . _ -, no / at the end)')
    return path


class ServeSection(Section):
    model: Text = Field(description="MLflow URI, checkpoint or plain model folder, or .pth")
    host: Text = Field("127.0.0.1", description="address to listen at; 0.0.0.0: every one, with no authentication")
    port: Whole = Field(8000, ge=1, le=65535, description="TCP port of HTTP")
    path: Annotated[str, AfterValidator(_is_path)] = Field(
        "/", description="path below which it answers, for several applications on one cluster"
    )
    replicas: Workers = Field((1, 1), description="copies of the model; [low, high]: as many as the requests need")
    gpus_per_replica: float = Field(0.0, ge=0, description="GPUs of a replica, 0.5 is half of one; 0 runs on the CPU")
    cpus_per_replica: Positive = Field(1.0, description="CPUs of a replica, and its threads")
    max_batch: OneOrMore = Field(4, description="images of equal size that are restored together")
    batch_wait_s: float = Field(0.01, ge=0, description="seconds that an image waits for others to be restored with")
    max_upload_mib: OneOrMore = Field(32, description="largest file that is taken")
    max_megapixels: Positive = Field(25.0, description="largest image that is decoded")
    max_queued: OneOrMore = Field(32, description="requests that may wait; more are told to come back")
    timeout_s: Positive = Field(300.0, description="seconds until a request is given up")
    memory_mib: OptionalCount = Field(
        None, ge=64, description="of a batch at work, larger images are cut; null: 2816, or 3/4 of its share of a GPU"
    )

    @field_validator("gpus_per_replica")
    @classmethod
    def _a_share_or_whole_ones(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} is neither a share of one GPU nor a whole number of them")
        return gpus


class DehazeSection(Section):
    input: Text = Field(description="a folder or URI of hazy images")
    output: Text = Field(description="a folder or URI for the restored ones, which keep their names and folders")
    model: Text = Field(description="MLflow URI, checkpoint or plain model folder, or .pth")
    format: Literal["keep", "png", "jpg", "tif", "webp"] = Field("keep", description="of the files; keep: as they were")
    transmission: bool = Field(False, description="also write NAME.transmission.png, 16 bit grey: 65535 is clear air")
    stages: bool = Field(False, description="also write NAME.stages.png: what every stage made of it; corun only")
    memory_mib: OptionalCount = Field(
        None, ge=64, description="of one image at work, larger ones are cut; null: 2816, or 3/4 of a GPU's memory"
    )
