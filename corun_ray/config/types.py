"""Define the types of values in a job file: each with its checks, its range and the spellings that it accepts."""

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

WORKERS = "workers"
"""Marks a number or a pair that is kept as a pair."""
COUNT = "count"
"""Marks a number of things: out of range it is "too few", where a size is "too small"."""


class Mismatch(ValueError):
    """Two sections that do not go together; `key` is the full path of the key to change."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


# --- Checks ---


def _convert_whole_float(value: Any) -> Any:
    """Convert 5e3 to 5000, as people write numbers of steps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"[{pair[0]}, {pair[1]}] is in the wrong order (low first)")
    return pair


def _convert_workers(value: Any) -> Any:
    """Convert a number n to [n, n] and check."""
    low, high = value if isinstance(value, tuple) and len(value) == 2 else (value, value)
    pair = _convert_whole_float(low), _convert_whole_float(high)

    for number in pair:
        # A bool is an int in Python, but not a number in YAML.
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{_format_json(value)} is not a whole number or [low, high]")
        if number < 1:
            raise ValueError(f"{_format_json(value)} is too few (at least 1)")
    return pair


def _format_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def check_distinct(items: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse an empty list, and a list that names anything twice."""
    if not items:
        raise ValueError("empty")
    if len(set(items)) < len(items):
        raise ValueError(f"[{', '.join(items)}] names one twice")
    return items


# --- Types ---

Whole = Annotated[int, BeforeValidator(_convert_whole_float)]
Count = Annotated[Whole, COUNT]
OptionalCount = Annotated[int | None, BeforeValidator(_convert_whole_float), COUNT]
OneOrMore = Annotated[Count, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
# Empty text counts as absent, so that `depth: ${DEPTH:-}` leaves the key out.
OptionalText = Annotated[Text | None, BeforeValidator(lambda value: None if value == "" else value)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_check_order)]
FractionRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_check_order)]
NotNegative = Annotated[float, Field(ge=0)]
DistanceRange = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_check_order)]
# A pair in the program, a number in YAML where both ends are equal.
Workers = Annotated[
    tuple[int, int],
    BeforeValidator(_convert_workers),
    AfterValidator(_check_order),
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

# Keys that several sections have, with other defaults.
LearningRate = Annotated[float, Field(gt=0, le=1, description="learning rate at the first step")]
MinLearningRate = Annotated[
    float, Field(ge=0, description="learning rate at the end of the schedule; equal to lr: constant")
]
ScheduleSteps = Annotated[OneOrMore, Field(description="length of the cosine schedule, in steps")]
Steps = Annotated[OneOrMore, Field(description="number of training steps")]
Batch = Annotated[OneOrMore, Field(description="images of each kind (synthetic, real) that a worker processes at once")]
RandomResize = Annotated[bool, Field(description="resize clear images by a random factor before the crop")]


# --- Sections ---


class Strict(BaseModel):
    """Frozen model: refuses unknown keys and values of another type, and checks its defaults as well."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Section(Strict):
    """A mapping of keys within a job."""

    @model_validator(mode="before")
    @classmethod
    def _accept_null(cls, value: Any) -> Any:
        """Accept null as a section without keys.

        In YAML a section with nothing below it is null. Its keys have their defaults.
        """
        return {} if value is None else value
