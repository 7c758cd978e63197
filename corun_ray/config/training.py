"""The sections of a job that say how the method runs: network, coherence, label pool, losses, optimiser."""

import ast
import difflib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from corun_ray.config.types import (
    Count,
    LearningRate,
    MinLearningRate,
    Mismatch,
    OneOrMore,
    OptionalCount,
    OptionalText,
    ScheduleSteps,
    Section,
    Whole,
    some_once,
)
from corun_ray.core.choices import QUALITY_NAMES, Clarity, Combine, Degradation, Encoding
from corun_ray.core.metrics.catalog import no_reference_metrics

TermWeight = Annotated[float, Field(ge=0)]


def _known_quality(name: str) -> str:
    known = [*QUALITY_NAMES, *no_reference_metrics()]
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        ours = ", ".join(QUALITY_NAMES)
        raise ValueError(f'"{name}" is neither of {ours} nor a metric of pyiqa that rates single images{hint}')
    return name


@cache
def architectures() -> tuple[str, ...]:
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
    known = ("corun", "spandrel", *architectures())
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f'"{name}" is neither corun, an architecture of spandrel nor module.path:ClassName{hint}')
    return name


class Network(Section):
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
    def _arguments_of_its_type(self) -> "Network":
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


class Coherence(Section):
    clarity: Clarity = Field("contrast", description="scorer of haze density; daclip needs weights")
    degradations: Annotated[tuple[Degradation, ...], AfterValidator(some_once)] = Field(
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
    def _what_scorers_need(self) -> "Coherence":
        if self.clarity == "daclip" and self.weights is None:
            raise Mismatch("coherence.weights", "missing (clarity daclip needs its weights)")
        if self.clarity != "daclip" and self.degradations != ("hazy",):
            raise Mismatch("coherence.degradations", f"only used by daclip, not by {self.clarity}")
        if self.quality in QUALITY_NAMES:
            if self.quality_range is not None:
                raise Mismatch("coherence.quality_range", f"not used by {self.quality}")
        elif self.quality_range is None:
            facts = no_reference_metrics()[self.quality]
            if facts.low is None or facts.high is None:
                raise Mismatch("coherence.quality_range", f"missing (pyiqa gives {self.quality} no range)")
        elif self.quality_range[0] == self.quality_range[1]:
            raise Mismatch("coherence.quality_range", "worst and best are the same")
        return self


class Pool(Section):
    shards: Count = Field(1, ge=1, le=256, description="number of actors that the labels are spread over")
    encoding: Encoding = Field("uint8", description="number type in which a label is kept")
    memory_mib: OptionalCount = Field(
        None, ge=1, description="labels in memory, all shards together; others are read back from storage; null: all"
    )


class Loss(Section):
    perceptual: Literal["none", "vgg19"] = Field(
        "none", description="network of the perceptual and contrastive terms; none leaves them out"
    )
    weights: OptionalText = Field(None, description="a folder or URI with that network's weights")
    pixel_weight: TermWeight = Field(1.0, description="weight of the L1 distance to the truth or label")
    scattering_weight: TermWeight = Field(0.01, description="weight of the re-hazed image's L1 distance to the input")
    perceptual_weight: TermWeight = Field(0.0, description="weight of the feature distance to the truth")
    contrastive_weight: TermWeight = Field(1.0, description="weight of near the truth, far from the input")

    @model_validator(mode="after")
    def _weights_of_its_network(self) -> "Loss":
        if self.perceptual != "none" and self.weights is None:
            raise Mismatch("loss.weights", f"missing (perceptual {self.perceptual} needs its weights)")
        return self


class ColabatorLoss(Loss):
    pixel_weight: TermWeight = Field(5.0, description="weight of the L1 distance to the truth or label")
    perceptual_weight: TermWeight = Field(0.2, description="weight of the feature distance to the truth")
    haze_density_weight: TermWeight = Field(0.0, description="weight of 1 - clarity of the restored real image")


class Cycle(Section):
    steps: OneOrMore = Field(description="length of the cycle")
    lr: LearningRate
    min_lr: float = Field(ge=0, description="learning rate at the cycle's end")


class Optim(Section):
    lr: LearningRate = 1e-4
    min_lr: MinLearningRate = Field(default_factory=lambda earlier: earlier["lr"])
    schedule_steps: ScheduleSteps = 30_000
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights (the teacher) per step")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the network")
    compile: bool = Field(False, description="compile the network with torch.compile")
    warmup_steps: Count = Field(0, ge=0, description="steps over which the learning rate first rises from near 0")
    cycles: tuple[Cycle, ...] = Field(
        (), description="cosine cycles with restarts ({steps, lr, min_lr}), instead of lr, min_lr and schedule_steps"
    )

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
