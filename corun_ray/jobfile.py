"""Reads job files: YAML, the environment, `--set`; all mistakes of a file at once, one plain line each."""

import difflib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from corun_ray.config import (
    COUNT,
    KINDS,
    LIMIT_WORDS,
    ORDER,
    Job,
    Mismatch,
    keys,
    limits,
)

Loc = tuple[str | int, ...]  # the place of a mistake in a document: keys, and positions in a list


class JobFileError(Exception):
    """Everything that is wrong with a job file: `lines`, one for each mistake."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


def load_jobs(path: Path, overrides: Sequence[str] = (), env: Mapping[str, str] = os.environ) -> list[Job]:
    """The jobs of a file, one for each YAML document, in order.

    `overrides` are `key.path=value` for every job that has the key, or `job:key.path=value` for the one of
    that name, the value in YAML. `${VAR}` and `${VAR:-default}` are filled in from `env`; a value that is
    nothing else takes the type that its text has in YAML.

    Raises JobFileError with the mistakes of all documents.
    """
    documents = _read(path, env)
    lines = [line for text in overrides for line in _override(documents, text, env)]
    names = [document.raw.get("name") for document in documents]
    jobs = []
    for number, (document, name) in enumerate(zip(documents, names, strict=True), 1):
        job = document.validate()
        first = names.index(name) + 1
        if first < number and isinstance(name, str):
            document.tell(("name",), f"{_show(name)} is the name of job {first} as well")
        label = name if isinstance(name, str) and names.count(name) == 1 else number
        lines += [f"job {label}: {line}" if len(documents) > 1 else line for line in document.lines()]
        jobs += [job] if job else []
    if lines:
        raise JobFileError(lines)
    return jobs


def dump_job(job: Job) -> str:
    """The resolved job as YAML, with every key that its kind uses; `load_jobs` reads an equal job from it."""
    values = job.model_dump()
    ordered = {key: values[key] for key in ORDER if key in values}
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


@dataclass
class _Document:
    """One YAML document as plain values, and what has been found wrong with it so far."""

    raw: dict[str, Any]
    mistakes: dict[Loc, str]

    @property
    def kind(self) -> str:
        """The kind that is written or probably meant, else the one that has most of the keys."""
        likeliest = max(KINDS, key=lambda kind: len(self.raw.keys() & KINDS[kind].model_fields.keys()))
        return _closest(self.raw.get("kind"), KINDS) or likeliest

    def put(self, loc: tuple[str, ...], value: Any, mistakes: dict[Loc, str]) -> None:
        """Replaces one value, and what was wrong there by what is wrong with the new one."""
        section = self.raw
        for key in loc[:-1]:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                return  # validation will say that this is not a mapping of keys
        section[loc[-1]] = value
        self.mistakes = {at: text for at, text in self.mistakes.items() if at[: len(loc)] != loc} | mistakes

    def tell(self, loc: Loc, text: str) -> None:
        """Notes a mistake, unless its place has one already."""
        self.mistakes.setdefault(loc, text)

    def validate(self) -> Job | None:
        kind, written = self.kind, self.raw.get("kind")
        if "kind" not in self.raw:
            self.tell(("kind",), f"missing ({', '.join(KINDS)})")
        elif written != kind:
            self.tell(("kind",), _not_one_of(written, KINDS))
        try:
            return KINDS[kind].model_validate(self.raw | {"kind": kind})
        except ValidationError as error:
            errors = error.errors(include_url=False)
        for loc, text in _mistakes(errors, kind, is_sure=_closest(written, KINDS) is not None):
            self.tell(loc, text)
        return None

    def lines(self) -> list[str]:
        """One line for each mistake, in the order in which a job's keys are listed."""
        place = {key: position for position, key in enumerate(ORDER)}
        mistakes = sorted(
            self.mistakes.items(), key=lambda mistake: place.get(str(mistake[0][0]), len(place))
        )
        return [f"{_path(loc)}: {text}" for loc, text in mistakes]


# Reading: text → plain values.

# Scalars of YAML 1.2. PyYAML's own follow YAML 1.1, where 5e-5 is text, `no` is false and 1:30 is 90.
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:null|Null|NULL|~|)$"), lambda text: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), lambda text: text.lower() == "true"),
    "int": (re.compile(rf"[-+]?(?:0|(?!0){_DIGITS})$"), int),
    "float": (
        re.compile(rf"[-+]?(?:{_DIGITS}\.[0-9]*|\.[0-9]+|{_DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
        float,
    ),
    "str": (re.compile(r"(?s:.*)$"), str),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Tells scalars apart as `_SCALARS` says."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would not read as text; writes tuples as lists in one line."""


for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {}
    for _name, (_pattern, _) in _SCALARS.items():
        _yaml.add_implicit_resolver(_TAG + _name, _pattern, None)
_Dumper.add_representer(
    tuple, lambda dumper, items: dumper.represent_sequence(_TAG + "seq", items, flow_style=True)
)

_INTERPOLATION = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}")
# While YAML is parsed, a number between two private-use characters stands for an interpolation: its braces
# mean nothing to YAML then, and the environment's text cannot add structure.
_HIDDEN = re.compile("\ue000([0-9]+)\ue001")


class _Reader:
    """Turns the YAML of one text into plain values (mappings, tuples, scalars), the environment filled in."""

    def __init__(self, text: str, env: Mapping[str, str]) -> None:
        self.env = env
        self.interpolations: list[str] = []
        self.mistakes: dict[Loc, str] = {}
        self.text = re.sub(r"\$\{[^}\n]*\}", self._hide, text)

    def _hide(self, match: re.Match[str]) -> str:
        self.interpolations.append(match[0])
        return f"\ue000{len(self.interpolations) - 1}\ue001"

    def value(self, node: yaml.Node, loc: Loc = ()) -> Any:
        """Raises YAMLError for what no job file has: tags of its own, keys that are no words."""
        tag = node.tag.removeprefix(_TAG)
        if tag not in (*_SCALARS, "map", "seq"):
            raise _yaml_error(node, f"unknown tag {node.tag}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item, (*loc, i)) for i, item in enumerate(node.value))
        text = _HIDDEN.sub(lambda match: self._fill(self.interpolations[int(match[1])], loc), node.value)
        if text and _HIDDEN.fullmatch(node.value):
            tag = next(name for name, (pattern, _) in _SCALARS.items() if pattern.fullmatch(text))
        try:
            return _SCALARS[tag][1](text)
        except (KeyError, ValueError) as error:
            raise _yaml_error(node, f"not a valid {tag}") from error

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _yaml_error(key_node, "a key must be a word")
            key = _HIDDEN.sub(lambda match: self.interpolations[int(match[1])], key_node.value)
            is_repeated = key in found
            found[key] = self.value(value_node, (*loc, key))
            if is_repeated:
                line = key_node.start_mark.line + 1
                self.mistakes[*loc, key] = f"given twice (again in line {line})"
        return found

    def _fill(self, written: str, loc: Loc) -> str:
        match = _INTERPOLATION.fullmatch(written)
        if not match:
            self.mistakes[loc] = f"{written} is neither ${{VAR}} nor ${{VAR:-default}}"
            return written
        value = self.env.get(match[1])
        if match[2] is not None:  # as in a shell, the default stands in for an empty variable too
            return value or match[2]
        if value is None:
            self.mistakes[loc] = f"environment variable {match[1]} is not set"
            return written
        return value


def _yaml_error(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _problem(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """The line, from 1, and the reason of a syntax error."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return error.problem_mark.line + 1, str(error.problem)
    position = getattr(error, "position", 0)
    return text.count("\n", 0, position) + 1, getattr(error, "reason", str(error))


def _read(path: Path, env: Mapping[str, str]) -> list[_Document]:
    try:
        reader = _Reader(path.read_text("utf-8"), env)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise JobFileError([f"{path}:{line}: not a text file (UTF-8)"]) from error
    except OSError as error:
        raise JobFileError([f"{path}: {(error.strerror or str(error)).lower()}"]) from error
    documents, lines = [], []
    try:
        for node in yaml.compose_all(reader.text, _Loader):
            reader.mistakes = {}
            raw = reader.value(node)
            if isinstance(raw, dict):
                documents.append(_Document(raw, reader.mistakes))
            elif raw is not None:
                what = "a list" if isinstance(raw, tuple) else "a single value"
                lines.append(
                    f"{path}:{node.start_mark.line + 1}: {what}, not a mapping of keys (kind, name, ...)"
                )
    except yaml.YAMLError as error:
        line, problem = _problem(error, reader.text)
        raise JobFileError([f"{path}:{line}: not valid YAML ({problem})"]) from error
    except RecursionError as error:
        raise JobFileError([f"{path}: nested too deeply"]) from error
    if not documents and not lines:
        lines = [f"{path}:1: empty, not a mapping of keys (kind, name, ...)"]
    if lines:
        raise JobFileError(lines)
    return documents


_SETTING = re.compile(r"(?:([^=:]+):)?([^=:]+)=(.*)", re.DOTALL)


def _override(documents: Sequence[_Document], setting: str, env: Mapping[str, str]) -> list[str]:
    """Applies one `--set`; the lines say what is wrong with the setting itself."""
    match = _SETTING.fullmatch(setting)
    if not match:
        return [f"--set {setting}: not key.path=value or job:key.path=value"]
    name, path, text = match.groups()
    named = [document for document in documents if name in (None, document.raw.get("name"))]
    if not named:
        names = ", ".join(str(document.raw.get("name")) for document in documents)
        return [f"--set {setting}: no job is named {name} (the jobs are {names})"]
    kinds = [kind for kind in KINDS if _takes(kind, path)]
    if not kinds:
        return [f"{path}: {_not_a_key(path, named[0].kind, used_elsewhere=False)}"]
    loc = tuple(path.split("."))
    reader = _Reader(text, env)
    try:
        node = yaml.compose(reader.text, _Loader)
        # A job of a pipeline that has no such key is left alone, unless none has it.
        for document in [d for d in named if d.kind in kinds] or named:
            reader.mistakes = {}
            document.put(loc, reader.value(node, loc) if node else "", reader.mistakes)
    except yaml.YAMLError as error:
        return [f"--set {setting}: not valid YAML ({_problem(error, reader.text)[1]})"]
    return []


def _takes(kind: str, path: str) -> bool:
    known = keys(KINDS[kind])
    parent = known.get(path.rpartition(".")[0])
    return path in known or (parent is not None and get_origin(parent.annotation) is dict)


# Wording: what pydantic found → one plain line.

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


def _mistakes(errors: Iterable[Any], kind: str, is_sure: bool) -> Iterator[tuple[Loc, str]]:
    """Where and what, in plain words. Where the kind is only guessed, nothing is said of its own keys."""
    known = keys(KINDS[kind])
    for error in errors:
        loc = tuple(part for part in error["loc"] if part != "[key]")
        path = _path(loc)
        cause = error.get("ctx", {}).get("error")
        if error["type"] == "default_factory_not_called":
            continue  # the error that kept it from being called is told
        if isinstance(cause, Mismatch):
            yield tuple(cause.key.split(".")), str(cause)
        elif error["type"] == "extra_forbidden":
            used_elsewhere = any(_takes(other, path) for other in KINDS)
            if is_sure or not used_elsewhere:
                yield loc, _not_a_key(path, kind, used_elsewhere)
        elif is_sure or error["type"] != "missing" or path in keys(Job):
            field = known.get(path) or known[_path(loc[:-1])]  # the latter for an entry of a mapping
            yield loc, _words(error, field)


def _words(error: Any, field: FieldInfo) -> str:
    value, ctx = _show(error["input"]), error.get("ctx", {})
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
            return _not_one_of(error["input"], re.findall(r"'([^']*)'", ctx["expected"]))
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
    span = limits(field)
    is_single = "ge" in span and span["ge"] == span.get("le")
    expected = f"only {limit} so far" if is_single else f"{LIMIT_WORDS[word]} {limit:.10g}"
    return f"too {low if word in ('ge', 'gt') else high} ({expected})"


def _not_one_of(value: Any, choices: Collection[str]) -> str:
    if len(choices) == 1:
        return f"{_show(value)} is not available (only {next(iter(choices))} so far)"
    return f"{_show(value)} is not one of {', '.join(choices)}{_did_you_mean(_closest(value, choices))}"


def _not_a_key(path: str, kind: str, used_elsewhere: bool) -> str:
    if used_elsewhere:
        return f"not used by {'an' if kind[0] in 'aeiou' else 'a'} {kind} job"
    return f"unknown key{_did_you_mean(_similar_key(path, keys(KINDS[kind])))}"


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


def _closest(value: Any, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(value, choices, 1)), None) if isinstance(value, str) else None


def _did_you_mean(suggestion: str | None) -> str:
    return f" (did you mean {suggestion}?)" if suggestion else ""


def _path(loc: Loc) -> str:
    return ".".join(part for part in loc if isinstance(part, str))


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
