"""Explain mistakes in a job file: an error of pydantic becomes one plain line, with a suggestion."""

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from corun_ray.config.credentials import mask_credentials
from corun_ray.config.jobs import KINDS, Job
from corun_ray.config.reference import LIMIT_WORDS, accepts_key, find_field, list_keys
from corun_ray.config.types import COUNT, Mismatch
from corun_ray.config.yaml_reader import Loc

_TYPE_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
}
"""Type of an error of pydantic → the expected value."""
_SYNONYMS = {
    "amp": "precision",
    "batch": "batch_per_worker",
    "batch_size": "batch_per_worker",
    "checkpoint": "init",
    "crop": "patch_px",
    "dtype": "precision",
    "gpus": "gpus_per_worker",
    "iterations": "steps",
    "learning_rate": "lr",
    "pretrained": "init",
    "weights": "init",
}
"""Common names of keys → their names here."""
MAX_VALUE_CHARACTERS = 60
SAME_SECTION_CUTOFF, OTHER_SECTION_CUTOFF = 0.6, 0.75
"""Similarity, from 0 to 1, that a suggested key has at least."""


def explain_errors(errors: Iterable[Any], kind: str, is_sure: bool) -> Iterator[tuple[Loc, str]]:
    """Yield the place and the explanation of each error.

    Where the kind is only guessed (not `is_sure`), mistakes of the kind's own keys are skipped.
    """
    for error in errors:
        # Parts in brackets are pydantic's own tags.
        loc = tuple(part for part in error["loc"] if not str(part).startswith("["))
        path = format_path(loc)
        cause = error.get("ctx", {}).get("error")

        # The error that kept the factory from being called is reported.
        if error["type"] == "default_factory_not_called":
            continue

        # Sections that do not go together name the key to change. They depend on the kind.
        if isinstance(cause, Mismatch) and is_sure:
            yield tuple(cause.key.split(".")), str(cause)
        elif isinstance(cause, Mismatch):
            continue

        # A key that this kind does not have.
        elif error["type"] == "extra_forbidden":
            used_elsewhere = any(accepts_key(other, path) for other in KINDS)
            if is_sure or not used_elsewhere:
                yield loc, explain_unknown_key(path, kind, used_elsewhere)

        # Any other error. All kinds have the keys of `Job`.
        elif is_sure or error["type"] != "missing" or path in list_keys(Job):
            yield loc, _explain(error, find_field(kind, loc))


def _explain(error: Any, field: FieldInfo) -> str:
    """Return an error of pydantic in plain words."""
    value = format_value(error["input"])
    ctx = error.get("ctx", {})
    match error["type"]:
        case "missing" if isinstance(error["loc"][-1], int):
            return f"{value} is too short ([low, high])"
        case "missing":
            return f"missing ({field.description})"
        case "too_long":
            return f"{value} is too long ([low, high])"
        case "string_too_short":
            return "empty"
        case "string_pattern_mismatch":
            return f"{value} is not a name (lower-case letters, digits and . _ -, starting with a letter or digit)"
        case "literal_error":
            return explain_choice(error["input"], re.findall(r"'([^']*)'", ctx["expected"]))
        case "value_error":
            return str(ctx["error"])
        case "multiple_of":
            return f"{value} is not a multiple of {ctx['multiple_of']}"
        case kind if kind in _TYPE_WORDS:
            return f"{value} is not {_TYPE_WORDS[kind]}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"{value} is {_explain_range(field, ctx)}"
        case _:
            return f"{value}: {error['msg']}"


def _explain_range(field: FieldInfo, ctx: Mapping[str, float]) -> str:
    # pydantic gives one limit, such as {"ge": 1}.
    (word, limit), *_ = ctx.items()
    low, high = ("few", "many") if COUNT in field.metadata else ("small", "large")
    return f"too {low if word in ('ge', 'gt') else high} ({LIMIT_WORDS[word]} {limit:.10g})"


def explain_choice(value: Any, choices: Collection[str]) -> str:
    """Explain that a value is none of the choices.

    The text suggests a similar choice.
    """
    if len(choices) == 1:
        return f"{format_value(value)} is not available (only {next(iter(choices))} so far)"
    return f"{format_value(value)} is not one of {', '.join(choices)}{_suggest(find_closest(value, choices))}"


def explain_unknown_key(path: str, kind: str, used_elsewhere: bool) -> str:
    """Explain that a job of this kind has no such key.

    `used_elsewhere` says that another kind has the key.
    """
    if used_elsewhere:
        article = "an" if kind[0] in "aeiou" else "a"
        return f"not used by {article} {kind} job"
    return f"unknown key{_suggest(_find_similar_key(path, list_keys(KINDS[kind])))}"


def _find_similar_key(path: str, known: Iterable[str]) -> str | None:
    """Return the key that was probably meant, if any.

    The key is spelt alike and stands in the same section, else in any other.
    """
    section, _, name = path.rpartition(".")
    name = _SYNONYMS.get(name, name)

    # Name → path of the keys in this section, and of all keys.
    here: dict[str, str] = {}
    anywhere: dict[str, str] = {}
    for other in known:
        other_section, _, other_name = other.rpartition(".")
        anywhere.setdefault(other_name, other)
        if other_section == section:
            here[other_name] = other

    for candidates, cutoff in ((here, SAME_SECTION_CUTOFF), (anywhere, OTHER_SECTION_CUTOFF)):
        close = difflib.get_close_matches(name, candidates, 1, cutoff)
        if close:
            return candidates[close[0]]
    return None


def find_closest(value: Any, choices: Iterable[str]) -> str | None:
    """Return the choice spelt most like a value.

    None where no choice is similar.
    """
    if not isinstance(value, str):
        return None
    close = difflib.get_close_matches(value, choices, 1)
    return close[0] if close else None


def _suggest(suggestion: str | None) -> str:
    return f" (did you mean {suggestion}?)" if suggestion else ""


def format_path(loc: Loc) -> str:
    """Return a place as text, `train.steps`, without positions in lists."""
    return ".".join(part for part in loc if isinstance(part, str))


def format_value(value: Any) -> str:
    """Return a value as text without credentials, shortened."""
    text = mask_credentials(json.dumps(value, ensure_ascii=False))
    if len(text) <= MAX_VALUE_CHARACTERS:
        return text
    return f"{text[: MAX_VALUE_CHARACTERS - 3]}..."
