"""Kinds of values that a job file holds: a type with its checks, ranges and the spellings that it takes."""

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

WORKERS = "workers"  # marks a number or a pair that is kept as a pair
COUNT = "count"  # marks a number of things: out of range it is "too few", where a size is "too small"


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


def _workers(value: Any) -> Any:
    """Takes a number n for [n, n]."""
    low, high = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    for number in (_whole(low), _whole(high)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{_written(value)} is not a whole number or [low, high]")
        if number < 1:
            raise ValueError(f"{_written(value)} is too few (at least 1)")
    return _whole(low), _whole(high)


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def check_distinct(items: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses an empty list and one that names anything twice."""
    if not items:
        raise ValueError("empty")
    if len(set(items)) < len(items):
        raise ValueError(f"[{', '.join(items)}] names one twice")
    return items


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, COUNT]
OptionalCount = Annotated[int | None, BeforeValidator(_whole), COUNT]
OneOrMore = Annotated[Count, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
# Empty text counts as absent, so that `depth: ${DEPTH:-}` leaves the key out.
OptionalText = Annotated[Text | None, BeforeValidator(lambda value: None if value == "" else value)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_low_first)]
FractionRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_low_first)]
Workers = Annotated[
    tuple[int, int],
    BeforeValidator(_workers),
    AfterValidator(_low_first),
    PlainSerializer(lambda pair: pair[0] if pair[0] == pair[1] else pair),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
            ]
        }
    ),
    WORKERS,
]
LearningRate = Annotated[float, Field(gt=0, le=1, description="learning rate at the first step")]
MinLearningRate = Annotated[float, Field(ge=0, description="learning rate at the schedule's end; lr: constant")]
ScheduleSteps = Annotated[OneOrMore, Field(description="length of the cosine schedule, in steps")]
Steps = Annotated[OneOrMore, Field(description="number of training steps")]
Batch = Annotated[OneOrMore, Field(description="images of each kind, synthetic and real, that a worker takes at once")]
RandomResize = Annotated[bool, Field(description="resize clear images by a random factor before the crop")]


class Strict(BaseModel):
    """Frozen; refuses unknown keys and values of another type; checks its defaults as well."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Section(Strict):
    """A mapping of keys within a job."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_below(cls, value: Any) -> Any:
        """A section with no key below it is null in YAML: it means the defaults."""
        return {} if value is None else value
