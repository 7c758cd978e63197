"""The sections of a job that say how the method runs: network, coherence, label pool, losses, optimiser.

The sections of a job that say which images it works on, and the haze that is laid on clear ones.

The section of a job that says how long it trains, on how many images at a time, and what it shows and keeps."""

import ast
import difflib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from corun_ray.config.types import (
    Batch,
    Count,
    Fraction,
    FractionRange,
    LearningRate,
    MinLearningRate,
    Mismatch,
    Name,
    OneOrMore,
    OptionalCount,
    OptionalText,
    PositiveRange,
    RandomResize,
    ScheduleSteps,
    Section,
    Steps,
    Text,
    Whole,
    check_distinct,
)
from corun_ray.core.choices import QUALITY_NAMES, Clarity, Combine, Degradation, DepthKind, Encoding
from corun_ray.core.metrics.catalog import list_no_reference_metrics

TermWeight = Annotated[float, Field(ge=0)]


def _known_quality(name: str) -> str:
    known = [*QUALITY_NAMES, *list_no_reference_metrics()]
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        ours = ", ".join(QUALITY_NAMES)
        raise ValueError(f'"{name}" is neither of {ours} nor a metric of pyiqa that rates single images{hint}')
    return name


@cache
def list_architectures() -> tuple[str, ...]:
    """The networks of spandrel, and of spandrel_extra_arches where that is installed, read without importing them."""
    found: list[str] = []
    for package in ("spandrel", "spandrel_extra_arches"):
        spec = find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(place, "architectures").glob("*/__init__.py")):
                exported = re.search(r"^__all__ = (\[[^\]]*\])", file.read_text("utf-8"), re.MULTILINE)
                names = ast.literal_eval(exported[1]) if exported else []
                found += [name for name in names if not name.endswith("Arch")]
    return tuple(found)


def _network_type(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return name
    known = ("corun", "spandrel", *list_architectures())
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f'"{name}" is neither corun, an architecture of spandrel nor module.path:ClassName{hint}')
    return name


class NetworkSection(Section):
    type: Annotated[str, AfterValidator(_network_type)] = Field(
        "corun",
        description="corun, an architecture of spandrel (NAFNet, ...), module.path:ClassName, or spandrel: as in init",
    )
    stages: OptionalCount = Field(
        default_factory=lambda earlier: 4 if earlier["type"] == "corun" else None,
        ge=2,
        le=16,
        description="number of unfolding stages; corun only",
    )
    width: OptionalCount = Field(
        default_factory=lambda earlier: 30 if earlier["type"] == "corun" else None,
        ge=4,
        multiple_of=2,
        description="number of feature channels; corun only",
    )
    args: dict[str, Any] = Field({}, description="arguments of the network's class; not for corun")
    init: OptionalText = Field(None, description="model to start from (MLflow URI, checkpoint, .pth)")
    checkpoint_activations: bool = Field(
        False, description="compute activations twice rather than keep them; less memory, more time; corun only"
    )

    @model_validator(mode="after")
    def _arguments_of_its_type(self) -> "NetworkSection":
        if self.type == "corun":
            if self.args:
                raise Mismatch("network.args", "not used by corun, which has stages and width")
            for key in ("stages", "width"):
                if getattr(self, key) is None:
                    raise Mismatch(f"network.{key}", "null (corun needs a number)")
            return self
        for key in ("stages", "width"):
            if getattr(self, key) is not None:
                raise Mismatch(f"network.{key}", f"only used by corun; {self.type} takes network.args")
        if self.checkpoint_activations:
            raise Mismatch("network.checkpoint_activations", f"only used by corun, not by {self.type}")
        return self


class CoherenceSection(Section):
    clarity: Clarity = Field("contrast", description="scorer of haze density; daclip needs weights")
    degradations: Annotated[tuple[Degradation, ...], AfterValidator(check_distinct)] = Field(
        ("hazy",), description="what counts as unclear; their probabilities add up; daclip only"
    )
    quality: Annotated[str, AfterValidator(_known_quality)] = Field(
        "clean", description="scorer of image quality: clean, unclipped or a no-reference metric of pyiqa (musiq, ...)"
    )
    quality_range: tuple[float, float] | None = Field(
        None, description="worst and best value of a pyiqa metric; null: pyiqa's own range and direction"
    )
    block_px: Whole = Field(32, ge=8, description="side of a block of the trust map, in pixels")
    combine: Combine = Field("addition", description="how clarity and quality become one weight")
    weights: OptionalText = Field(None, description="a folder or URI of the scorers' weights (see corun-ray weights)")
    chunk_images: OneOrMore = Field(64, description="blocks that a scoring network takes at once")
    share_blocks: bool = Field(False, description="workers rate each other's winners' blocks; pays for slow scorers")

    @model_validator(mode="after")
    def _what_scorers_need(self) -> "CoherenceSection":
        if self.clarity == "daclip" and self.weights is None:
            raise Mismatch("coherence.weights", "missing (clarity daclip needs its weights)")
        if self.clarity != "daclip" and self.degradations != ("hazy",):
            raise Mismatch("coherence.degradations", f"only used by daclip, not by {self.clarity}")
        if self.quality in QUALITY_NAMES:
            if self.quality_range is not None:
                raise Mismatch("coherence.quality_range", f"not used by {self.quality}")
        elif self.quality_range is None:
            facts = list_no_reference_metrics()[self.quality]
            if facts.low is None or facts.high is None:
                raise Mismatch("coherence.quality_range", f"missing (pyiqa gives {self.quality} no range)")
        elif self.quality_range[0] == self.quality_range[1]:
            raise Mismatch("coherence.quality_range", "worst and best are the same")
        return self


class PoolSection(Section):
    shards: Count = Field(1, ge=1, le=256, description="number of actors that the labels are spread over")
    encoding: Encoding = Field("uint8", description="number type in which a label is kept")
    memory_mib: OptionalCount = Field(
        None, ge=1, description="labels in memory, all shards together; others are read back from storage; null: all"
    )


class LossSection(Section):
    perceptual: Literal["none", "vgg19"] = Field(
        "none", description="network of the perceptual and contrastive terms; none leaves them out"
    )
    weights: OptionalText = Field(None, description="a folder or URI with that network's weights")
    pixel_weight: TermWeight = Field(1.0, description="weight of the L1 distance to the truth or label")
    scattering_weight: TermWeight = Field(0.01, description="weight of the re-hazed image's L1 distance to the input")
    perceptual_weight: TermWeight = Field(0.0, description="weight of the feature distance to the truth")
    contrastive_weight: TermWeight = Field(1.0, description="weight of near the truth, far from the input")

    @model_validator(mode="after")
    def _weights_of_its_network(self) -> "LossSection":
        if self.perceptual != "none" and self.weights is None:
            raise Mismatch("loss.weights", f"missing (perceptual {self.perceptual} needs its weights)")
        return self


class ColabatorLossSection(LossSection):
    pixel_weight: TermWeight = Field(5.0, description="weight of the L1 distance to the truth or label")
    perceptual_weight: TermWeight = Field(0.2, description="weight of the feature distance to the truth")
    haze_density_weight: TermWeight = Field(0.0, description="weight of 1 - clarity of the restored real image")


class CycleSection(Section):
    steps: OneOrMore = Field(description="length of the cycle")
    lr: LearningRate
    min_lr: float = Field(ge=0, description="learning rate at the cycle's end")


class OptimSection(Section):
    lr: LearningRate = 1e-4
    min_lr: MinLearningRate = Field(default_factory=lambda earlier: earlier["lr"])
    schedule_steps: ScheduleSteps = 30_000
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights (the teacher) per step")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the network")
    compile: bool = Field(False, description="compile the network with torch.compile")
    warmup_steps: Count = Field(0, ge=0, description="steps over which the learning rate first rises from near 0")
    cycles: tuple[CycleSection, ...] = Field(
        (), description="cosine cycles with restarts ({steps, lr, min_lr}), instead of lr, min_lr and schedule_steps"
    )

    @field_validator("min_lr")
    @classmethod
    def _not_above_lr(cls, min_lr: float, info: ValidationInfo) -> float:
        if min_lr > info.data.get("lr", min_lr):
            raise ValueError(f"{min_lr} is more than optim.lr ({info.data['lr']})")
        return min_lr


class ColabatorOptimSection(OptimSection):
    lr: LearningRate = 5e-5
    min_lr: MinLearningRate = Field(default_factory=lambda earlier: min(1e-6, earlier["lr"]))
    schedule_steps: ScheduleSteps = 50_000


class ValidationSection(Section):
    hazy: Text = Field(description="a folder or URI of hazy images")
    clear: OptionalText = Field(None, description="a folder or URI of their clear truth, paired by stem")


class PairedSection(Section):
    hazy: Text = Field(description="a folder, pack or URI of degraded images")
    clear: Text = Field(description="a folder, pack or URI of their clean truth, paired by stem")


class TrainingDataSection(Section):
    clear: OptionalText = Field(None, description="a folder, pack or URI of clear images, on which haze is laid")
    depth: OptionalText = Field(None, description="a folder, pack or URI of their depth; null: a procedural depth")
    depth_kind: DepthKind = Field("inverse", description="metres: far is large and 0 is no reading")
    paired: PairedSection | None = Field(None, description="degraded and clean images, instead of clear and depth")
    validation: ValidationSection | None = Field(None, description="held-out images")
    validation_sets: dict[Name, ValidationSection] = Field(
        {}, description="more held-out images, by name: {hazy, clear}"
    )
    patch_px: Whole = Field(288, ge=32, multiple_of=16, description="side of a training patch, in pixels")
    random_resize: RandomResize = False
    rotation: bool = Field(False, description="turn synthetic or paired patches by a random multiple of 90 degrees")
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta(alpha, alpha) that mixes pairs; 0: no mixup")
    cache_mib: Count = Field(
        0, ge=0, description="decoded images kept in each node's object store, at most half of it; 0: none"
    )
    max_bad_fraction: Fraction = Field(0.01, description="fraction of unusable images tolerated")

    @field_validator("paired")
    @classmethod
    def _one_source_of_pairs(cls, paired: PairedSection | None, info: ValidationInfo) -> PairedSection | None:
        if "clear" not in info.data:
            return paired  # what is wrong with it is told
        if (info.data["clear"] is None) == (paired is None):
            text = "missing (a folder or URI of clear images; or give data.paired)"
            raise Mismatch("data.clear", text if paired is None else "not used together with data.paired")
        if paired is not None and info.data.get("depth") is not None:
            raise Mismatch("data.depth", "not used together with data.paired")
        return paired


class ColabatorDataSection(TrainingDataSection):
    hazy: Text = Field(description="a folder, pack or URI of real hazy images")
    random_resize: RandomResize = True


class HazeSection(Section):
    beta: PositiveRange = Field((0.2, 2.8), description="scattering coefficient, each more than 0")
    airlight: FractionRange = Field((0.25, 1.0), description="brightness of the airlight, each in 0 to 1")
    airlight_tint: float = Field(0.025, ge=0, description="largest deviation of a colour channel from it")


class TrainSection(Section):
    steps: Steps = 30_000
    batch_per_worker: Batch = 2
    accumulate: OneOrMore = Field(1, description="batches of a worker in a step, in turn, as of so many workers")
    log_every: OneOrMore = Field(50, description="steps between two lines of metrics")
    checkpoint_every: OneOrMore = Field(500, description="steps between two checkpoints")
    validate_every: OneOrMore = Field(500, description="steps between two validations")
    keep_checkpoints: OneOrMore = Field(2, description="number of checkpoints kept")
    validation_images: OneOrMore = Field(8, description="number of pictures in the validation grid")

    @property
    def images_per_worker(self) -> int:
        """Of each kind, in a worker's step."""
        return self.batch_per_worker * self.accumulate


class ProgressiveStep(Section):
    from_step: Count = Field(ge=1, description="first step of the phase, counted from 0")
    patch_px: Whole = Field(ge=32, multiple_of=16, description="side of a training patch, in pixels")
    batch_per_worker: Batch


class PretrainTrainSection(TrainSection):
    progressive: tuple[ProgressiveStep, ...] = Field(
        (), description="later patch and batch sizes: a list of {from_step, patch_px, batch_per_worker}"
    )

    @field_validator("progressive")
    @classmethod
    def _in_order(cls, phases: tuple[ProgressiveStep, ...], info: ValidationInfo) -> tuple[ProgressiveStep, ...]:
        starts = [phase.from_step for phase in phases]
        if starts != sorted(set(starts)):
            raise ValueError("its from_step must rise from phase to phase")
        steps = info.data.get("steps")
        if steps and starts and starts[-1] >= steps:
            raise ValueError(f"from_step {starts[-1]} is not before train.steps ({steps})")
        return phases


class ColabatorTrainSection(TrainSection):
    steps: Steps = 5_000
    batch_per_worker: Batch = 1
