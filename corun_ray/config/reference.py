"""List the keys of a job file: their order, their ranges, and the text that explains each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from corun_ray.config.jobs import KINDS, Job
from corun_ray.config.types import WORKERS, Section

LIMIT_WORDS = {
    "ge": "at least",
    "gt": "more than",
    "le": "at most",
    "lt": "less than",
    "multiple_of": "multiple of",
}

ORDER = (
    "kind",
    "name",
    "seed",
    "storage",
    "data",
    "haze",
    "network",
    "coherence",
    "pool",
    "loss",
    "optim",
    "train",
    "tune",
    "evaluate",
    "dehaze",
    "depth",
    "serve",
    "cluster",
    "tracking",
)
"""Order in which a job's keys are listed and written; a kind has some of the sections."""
REFERENCE_KINDS = ("tune", "colabator", "pretrain", "evaluate", "dehaze", "depth", "serve")
"""Kinds by precedence: the reference takes a key's description and order from the first kind that has the key."""


def list_keys(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return path → key of a job or section.

    A section comes before its keys.
    """
    # A job's own keys have an order; those of a section are in the order of their definition.
    names = list(model.model_fields)
    if issubclass(model, Job):
        names.sort(key=ORDER.index)

    found = {}
    for name in names:
        field = model.model_fields[name]
        found[prefix + name] = field
        section = find_section(field)
        if section:
            found |= list_keys(section, f"{prefix}{name}.")
    return found


def find_section(field: FieldInfo) -> type[Section] | None:
    """Return the section below a key, None for values."""
    if get_origin(field.annotation) in (dict, tuple):
        return None
    return _find_section_type(field)


def find_field(kind: str, loc: Iterable[str | int]) -> FieldInfo:
    """Return the key at a place in a job.

    Where the place is within a list or mapping, or unknown, the nearest key above.
    """
    model: type[BaseModel] | None = KINDS[kind]
    found: FieldInfo | None = None
    for part in loc:
        if model is None or part not in model.model_fields:
            continue  # a position in a list, a name in a mapping, or an unknown key
        found = model.model_fields[str(part)]
        model = _find_section_type(found)
    assert found is not None
    return found


def _find_section_type(field: FieldInfo) -> type[Section] | None:
    """Find the section in a key's type."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def read_limits(field: FieldInfo) -> dict[str, float]:
    """Return the range of a number, by the keys of `LIMIT_WORDS`."""
    found = {}
    for word in LIMIT_WORDS:
        for constraint in field.metadata:
            if hasattr(constraint, word):
                found[word] = getattr(constraint, word)
    return found


def accepts_key(kind: str, path: str) -> bool:
    """Tell whether jobs of this kind accept a key.

    The key is known, or in a mapping of free names.
    """
    known = list_keys(KINDS[kind])
    if path in known:
        return True

    # Look for a mapping above: its names are free.
    parts = path.split(".")
    for count in range(1, len(parts)):
        field = known.get(".".join(parts[:count]))
        if field is not None and get_origin(field.annotation) is dict:
            return True
    return False


def format_reference() -> str:
    """Format every key with its default, type and meaning.

    Defaults are given by kind; a number has its range.
    """
    by_kind = {kind: list_keys(job) for kind, job in KINDS.items()}
    lines: list[str] = []
    section_users = ""
    for path, field in _merge_keys(by_kind).items():
        kinds = [kind for kind in KINDS if path in by_kind[kind]]
        users = f" ({', '.join(kinds)} only)" if len(kinds) < len(KINDS) else ""

        # Each kind of job has a value of its own for this key.
        if path == "kind":
            lines += [f"  {path:<26} required", f"      {' | '.join(KINDS)}; what the job does"]
            continue

        # A section of a job is a heading.
        if find_section(field) and "." not in path:
            lines += ["", f"{path}: {field.description}{users}"]
            section_users = users
            continue

        # A key has two lines. Its users are named where they are not those of its section.
        meaning = f"{field.description}{users if users != section_users else ''}"
        value_type = "whole number or [low, high]" if WORKERS in field.metadata else _format_type(field.annotation)
        lines.append(f"  {path:<26} {_format_defaults(path, kinds, by_kind)}")
        lines.append(f"      {value_type}{_format_range(field)}; {meaning}")
    return "\n".join(lines) + "\n"


def _merge_keys(by_kind: Mapping[str, dict[str, FieldInfo]]) -> dict[str, FieldInfo]:
    """Merge the keys of all kinds, section by section.

    A key of several kinds is that of the first kind in `REFERENCE_KINDS`.
    """
    merged: dict[str, FieldInfo] = {}
    place: dict[str, int] = {}
    for kind in reversed(REFERENCE_KINDS):
        merged |= by_kind[kind]
    for kind in REFERENCE_KINDS:
        place |= {path: number for number, path in enumerate(by_kind[kind])}

    in_order = sorted(merged, key=lambda path: (ORDER.index(path.partition(".")[0]), place[path]))
    return {path: merged[path] for path in in_order}


def _format_defaults(path: str, kinds: Sequence[str], by_kind: Mapping[str, dict[str, FieldInfo]]) -> str:
    """Format a key's default.

    Where kinds differ, each default has its kinds.
    """
    kinds_by_default: dict[str, list[str]] = {}
    for kind in kinds:
        kinds_by_default.setdefault(_format_default(path, by_kind[kind]), []).append(kind)

    if len(kinds_by_default) == 1:
        return next(iter(kinds_by_default))
    return ", ".join(f"{default} in {' and '.join(kinds)}" for default, kinds in kinds_by_default.items())


def _format_default(path: str, fields: Mapping[str, FieldInfo]) -> str:
    """Return a key's default in jobs of one kind as YAML."""
    if fields[path].is_required():
        return "required"

    # A default may depend on other keys of its section: give them theirs.
    section = path.rpartition(".")[0]
    siblings = {}
    for other_path, field in fields.items():
        other_section, _, name = other_path.rpartition(".")
        if other_section == section:
            siblings[name] = field.default
    value = fields[path].get_default(call_default_factory=True, validated_data=siblings)

    # Show equal ends as one number, and text without quotes.
    if WORKERS in fields[path].metadata and value[0] == value[1]:
        value = value[0]
    return value if value and isinstance(value, str) else json.dumps(value)


def _format_type(annotation: Any) -> str:
    """Return a key's type in words."""
    inner = get_args(annotation)
    match get_origin(annotation):
        case None:
            words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
            return words.get(annotation, "mapping")
        case origin if origin is Literal:
            return " | ".join(inner)
        case origin if origin is tuple:
            return f"list of {_format_type(inner[0])}" if inner[1] is ... else "[low, high]"
        case origin if origin is dict:
            return "mapping"
        case _:  # X | None
            return _format_type(inner[0])


def _format_range(field: FieldInfo) -> str:
    return "".join(f", {LIMIT_WORDS[word]} {limit:.10g}" for word, limit in read_limits(field).items())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to `section.key: value`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
