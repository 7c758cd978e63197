"""The sections of a job that say which images it works on, and the haze that is laid on clear ones."""

from pydantic import Field, ValidationInfo, field_validator

from corun_ray.config.types import (
    Count,
    Fraction,
    FractionRange,
    Mismatch,
    Name,
    OptionalText,
    PositiveRange,
    RandomResize,
    Section,
    Text,
    Whole,
)
from corun_ray.core.choices import DepthKind


class Validation(Section):
    hazy: Text = Field(description="a folder or URI of hazy images")
    clear: OptionalText = Field(None, description="a folder or URI of their clear truth, paired by stem")


class Paired(Section):
    hazy: Text = Field(description="a folder, pack or URI of degraded images")
    clear: Text = Field(description="a folder, pack or URI of their clean truth, paired by stem")


class TrainingData(Section):
    clear: OptionalText = Field(None, description="a folder, pack or URI of clear images, on which haze is laid")
    depth: OptionalText = Field(None, description="a folder, pack or URI of their depth; null: a procedural depth")
    depth_kind: DepthKind = Field("inverse", description="metres: far is large and 0 is no reading")
    paired: Paired | None = Field(None, description="degraded and clean images, instead of clear and depth")
    validation: Validation | None = Field(None, description="held-out images")
    validation_sets: dict[Name, Validation] = Field({}, description="more held-out images, by name: {hazy, clear}")
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
    def _one_source_of_pairs(cls, paired: Paired | None, info: ValidationInfo) -> Paired | None:
        if "clear" not in info.data:
            return paired  # what is wrong with it is told
        if (info.data["clear"] is None) == (paired is None):
            text = "missing (a folder or URI of clear images; or give data.paired)"
            raise Mismatch("data.clear", text if paired is None else "not used together with data.paired")
        if paired is not None and info.data.get("depth") is not None:
            raise Mismatch("data.depth", "not used together with data.paired")
        return paired


class ColabatorData(TrainingData):
    hazy: Text = Field(description="a folder, pack or URI of real hazy images")
    random_resize: RandomResize = True


class Haze(Section):
    beta: PositiveRange = Field((0.2, 2.8), description="scattering coefficient, each more than 0")
    airlight: FractionRange = Field((0.25, 1.0), description="brightness of the airlight, each in 0 to 1")
    airlight_tint: float = Field(0.025, ge=0, description="largest deviation of a colour channel from it")
