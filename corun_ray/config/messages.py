"""The wording of mistakes in a job file: what pydantic found → one plain line, with what was probably meant."""

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


def explain_errors(errors: Iterable[Any], kind: str, is_sure: bool) -> Iterator[tuple[Loc, str]]:
    """Where and what, in plain words. Where the kind is only guessed, nothing is said of its own keys."""
    for error in errors:
        loc = tuple(part for part in error["loc"] if not str(part).startswith("["))  # pydantic's own
        path = format_path(loc)
        cause = error.get("ctx", {}).get("error")
        if error["type"] == "default_factory_not_called":
            continue  # the error that kept it from being called is told
        if isinstance(cause, Mismatch) and is_sure:
            yield tuple(cause.key.split(".")), str(cause)
        elif isinstance(cause, Mismatch):
            continue  # what goes together depends on the kind
        elif error["type"] == "extra_forbidden":
            used_elsewhere = any(accepts_key(other, path) for other in KINDS)
            if is_sure or not used_elsewhere:
                yield loc, explain_unknown_key(path, kind, used_elsewhere)
        elif is_sure or error["type"] != "missing" or path in list_keys(Job):
            yield loc, _words(error, find_field(kind, loc))


def _words(error: Any, field: FieldInfo) -> str:
    value, ctx = format_value(error["input"]), error.get("ctx", {})
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
            return f"{value} is not a name (lower-case letters, digits, . _ - and no . _ - in front)"
        case "literal_error":
            return explain_choice(error["input"], re.findall(r"'([^']*)'", ctx["expected"]))
        case "value_error":
            return str(ctx["error"])
        case "multiple_of":
            return f"{value} is not a multiple of {ctx['multiple_of']}"
        case kind if kind in _TYPE_WORDS:
            return f"{value} is not {_TYPE_WORDS[kind]}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"{value} is {_out_of_range(field, ctx)}"
        case _:
            return f"{value}: {error['msg']}"


def _out_of_range(field: FieldInfo, ctx: Mapping[str, float]) -> str:
    (word, limit), *_ = ctx.items()
    low, high = ("few", "many") if COUNT in field.metadata else ("small", "large")
    return f"too {low if word in ('ge', 'gt') else high} ({LIMIT_WORDS[word]} {limit:.10g})"


def explain_choice(value: Any, choices: Collection[str]) -> str:
    """Says that a value is none of the choices, and which of them it resembles."""
    if len(choices) == 1:
        return f"{format_value(value)} is not available (only {next(iter(choices))} so far)"
    return f"{format_value(value)} is not one of {', '.join(choices)}{_did_you_mean(find_closest(value, choices))}"


def explain_unknown_key(path: str, kind: str, used_elsewhere: bool) -> str:
    """Says that a job of this kind has no such key; `used_elsewhere`: another kind has it."""
    if used_elsewhere:
        return f"not used by {'an' if kind[0] in 'aeiou' else 'a'} {kind} job"
    return f"unknown key{_did_you_mean(_similar_key(path, list_keys(KINDS[kind])))}"


def _similar_key(path: str, known: Iterable[str]) -> str | None:
    """The key that was probably meant: one spelt alike, in this section first, then in any."""
    section, _, name = path.rpartition(".")
    name = _SYNONYMS.get(name, name)
    elsewhere: dict[str, str] = {}
    here: dict[str, str] = {}
    for other in known:
        other_section, _, other_name = other.rpartition(".")
        elsewhere.setdefault(other_name, other)
        if other_section == section:
            here[other_name] = other
    for candidates, cutoff in ((here, 0.6), (elsewhere, 0.75)):
        if close := difflib.get_close_matches(name, candidates, 1, cutoff):
            return candidates[close[0]]
    return None


def find_closest(value: Any, choices: Iterable[str]) -> str | None:
    """The choice spelt most like a value, if any is."""
    return next(iter(difflib.get_close_matches(value, choices, 1)), None) if isinstance(value, str) else None


def _did_you_mean(suggestion: str | None) -> str:
    return f" (did you mean {suggestion}?)" if suggestion else ""


def format_path(loc: Loc) -> str:
    """A place as people write it, `train.steps`; positions in a list are left out."""
    return ".".join(part for part in loc if isinstance(part, str))


def format_value(value: Any) -> str:
    """A value as it may have been written, without credentials, shortened to 60 characters."""
    text = mask_credentials(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else f"{text[:57]}..."
