"""The keys of a job file as a list: their order, their ranges, and the text that explains each of them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from corun_ray.config.jobs import KINDS, ColabatorJob, DehazeJob, EvaluateJob, Job, PretrainJob, ServeJob, TuneJob
from corun_ray.config.types import WORKERS, Section

LIMIT_WORDS = {
    "ge": "at least",
    "gt": "more than",
    "le": "at most",
    "lt": "less than",
    "multiple_of": "multiple of",
}

# The order in which a job's keys are listed and written; sections that a kind does not use are left out.
ORDER = (
    *("kind", "name", "seed", "storage", "data", "haze", "network", "coherence", "pool"),
    *("loss", "optim", "train", "tune", "evaluate", "dehaze", "serve", "cluster", "tracking"),
)


def list_keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of a job or section by its full path; a section comes before its keys."""
    found = {}
    for name in sorted(model.model_fields, key=ORDER.index) if issubclass(model, Job) else model.model_fields:
        field = model.model_fields[name]
        found[prefix + name] = field
        if section := find_section(field):
            found |= list_keys(section, f"{prefix}{name}.")
    return found


def find_section(field: FieldInfo) -> type[Section] | None:
    """The section below a key, None for a key that holds a value."""
    return None if get_origin(field.annotation) in (dict, tuple) else _section_in(field)


def find_field(kind: str, loc: Iterable[str | int]) -> FieldInfo:
    """The key at a place in a job of this kind, also within a list or mapping; else the nearest one above it."""
    model: type[BaseModel] | None = KINDS[kind]
    found: FieldInfo | None = None
    for part in loc:
        if model is None or part not in model.model_fields:
            continue  # a position in a list, a name in a mapping, or a key that nobody knows
        found = model.model_fields[str(part)]
        model = _section_in(found)
    assert found is not None
    return found


def _section_in(field: FieldInfo) -> type[Section] | None:
    types = (field.annotation, *get_args(field.annotation))
    return next((t for t in types if isinstance(t, type) and issubclass(t, Section)), None)


def read_limits(field: FieldInfo) -> dict[str, float]:
    """The range of a number, its keys those of `LIMIT_WORDS`."""
    return {word: getattr(c, word) for word in LIMIT_WORDS for c in field.metadata if hasattr(c, word)}


def accepts_key(kind: str, path: str) -> bool:
    """Whether jobs of this kind have the key, or a mapping that may hold it."""
    known = list_keys(KINDS[kind])
    parts = path.split(".")
    above = (known.get(".".join(parts[:count])) for count in range(1, len(parts)))
    return path in known or any(field is not None and get_origin(field.annotation) is dict for field in above)


def format_reference() -> str:
    """A plain-text list of every key with its default (by kind), type, range and meaning."""
    by_kind = {kind: list_keys(job) for kind, job in KINDS.items()}
    lines: list[str] = []
    said = ""
    kinds: tuple[type[Job], ...] = (TuneJob, ColabatorJob, PretrainJob, EvaluateJob, DehazeJob, ServeJob)
    for path, field in _in_order(*(list_keys(kind) for kind in kinds)).items():
        users = [kind for kind in KINDS if path in by_kind[kind]]
        only = f" ({', '.join(users)} only)" if len(users) < len(KINDS) else ""
        if find_section(field) and "." not in path:
            lines += ["", f"{path}: {field.description}{only}"]
            said = only
            continue
        defaults: dict[str, list[str]] = {}
        for kind in users:
            defaults.setdefault(_default(path, by_kind[kind]), []).append(kind)
        each = [f"{default} in {' and '.join(kinds)}" for default, kinds in defaults.items()]
        default = ", ".join(each) if len(defaults) > 1 else next(iter(defaults))
        meaning = f"{field.description}{only if only != said else ''}"
        kind_of_value = "whole number or [low, high]" if WORKERS in field.metadata else _type(field.annotation)
        lines += [f"  {path:<26} {default}", f"      {kind_of_value}{_range(field)}; {meaning}"]
    return "\n".join(lines) + "\n"


def _in_order(*kinds: dict[str, FieldInfo]) -> dict[str, FieldInfo]:
    """The keys of several kinds of job as one list, section by section."""
    merged = {path: field for fields in reversed(kinds) for path, field in fields.items()}
    place = {path: number for fields in kinds for number, path in enumerate(fields)}
    return {path: merged[path] for path in sorted(merged, key=lambda path: (_section(path), place[path]))}


def _section(path: str) -> int:
    return ORDER.index(path.partition(".")[0])


def _default(path: str, fields: dict[str, FieldInfo]) -> str:
    if fields[path].is_required():
        return "required"
    section = path.rpartition(".")[0]
    siblings = {p.rpartition(".")[2]: f.default for p, f in fields.items() if p.rpartition(".")[0] == section}
    value = fields[path].get_default(call_default_factory=True, validated_data=siblings)
    if WORKERS in fields[path].metadata and value[0] == value[1]:
        value = value[0]
    return value if value and isinstance(value, str) else json.dumps(value)


def _type(annotation: Any) -> str:
    inner = get_args(annotation)
    match get_origin(annotation):
        case None:
            words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
            return words.get(annotation, "mapping")
        case origin if origin is Literal:
            return " | ".join(inner)
        case origin if origin is tuple:
            return f"list of {_type(inner[0])}" if inner[1] is ... else "[low, high]"
        case origin if origin is dict:
            return "mapping"
        case _:  # X | None
            return _type(inner[0])


def _range(field: FieldInfo) -> str:
    return "".join(f", {LIMIT_WORDS[word]} {limit:.10g}" for word, limit in read_limits(field).items())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections → `section.key: value`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
