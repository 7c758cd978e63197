"""The `evaluate` section of a job file: what is measured, of which models, on which images."""

import difflib
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from corun_ray.config.types import Mismatch, Name, OptionalText, Section, Text, some_once
from corun_ray.core.metrics.catalog import OWN, all_metrics

Baseline = Literal["hazy", "dark_channel"]


def _known_metric(name: str) -> str:
    if name not in all_metrics():
        close = difflib.get_close_matches(name, all_metrics(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f'"{name}" is neither of {", ".join(OWN)} nor a metric of pyiqa for images{hint}')
    return name


def _some_once_if_any(items: tuple[str, ...]) -> tuple[str, ...]:
    return some_once(items) if items else items


class Evaluate(Section):
    hazy: Text = Field(description="a folder or URI of hazy images")
    clear: OptionalText = Field(None, description="a folder or URI of their clear truth, paired by stem")
    models: dict[Name, Text] = Field({}, description="models by name; empty: the baselines alone are measured")
    baselines: Annotated[tuple[Baseline, ...], AfterValidator(_some_once_if_any)] = Field(
        get_args(Baseline), description="hazy: the input as it is; dark_channel: dehazed by the dark channel prior"
    )
    metrics: Annotated[tuple[Annotated[str, AfterValidator(_known_metric)], ...], AfterValidator(some_once)] = Field(
        default_factory=lambda earlier: tuple(OWN) if earlier["clear"] else ("fade",),
        description="psnr, ssim, fade or any metric of pyiqa (musiq, lpips, ...); null clear: those that need no truth",
    )
    weights: OptionalText = Field(None, description="a folder or URI of pyiqa's weights (see corun-ray weights)")
    against: Name | None = Field(
        None, description="the model or baseline that the others are compared with; null: the first model"
    )

    @field_validator("metrics")
    @classmethod
    def _truth_for_references(cls, metrics: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        needing = [metric for metric in metrics if all_metrics()[metric].needs_truth]
        if needing and info.data.get("clear", "") is None:
            raise ValueError(f"{' and '.join(needing)} cannot be measured without evaluate.clear")
        return metrics

    @model_validator(mode="after")
    def _someone_to_measure(self) -> "Evaluate":
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
