"""The `tune` section of a job file: which keys vary and over what, and how trials are judged."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from corun_ray.config.types import Count, OneOrMore, OptionalCount, Section, Text


class Range(Section):
    """Numbers between two ends; whole ones where both ends are."""

    low: int | float = Field(description="the smallest value")
    high: int | float = Field(description="the largest value")
    log: bool = Field(False, description="evenly spread in the logarithm")

    @model_validator(mode="after")
    def _low_first(self) -> "Range":
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
        is_section = isinstance(choice, dict) and not choice.keys() & Range.model_fields.keys()
        flat |= _flat(choice, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": choice}
    return flat


def _not_empty(search: dict[str, Any]) -> dict[str, Any]:
    if not search:
        raise ValueError("empty (a mapping such as network.stages: [2, 3, 4])")
    if lone := [key for key, choice in search.items() if isinstance(choice, tuple) and not choice]:
        raise ValueError(f"{lone[0]} has nothing to choose from")
    return search


Choice = tuple[Any, ...] | Range
_Choice = Annotated[
    Annotated[tuple[Any, ...], Tag("[list]")] | Annotated[Range, Tag("[range]")],
    Discriminator(lambda choice: "[range]" if isinstance(choice, dict | Range) else "[list]"),
]
Search = Annotated[dict[str, _Choice], BeforeValidator(_flat), AfterValidator(_not_empty)]


class Tune(Section):
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
