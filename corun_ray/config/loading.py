"""Reads job files: YAML, the environment, `--set`; all mistakes of a file at once, one plain line each."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from corun_ray.config.jobs import KINDS, Job, TuneJob
from corun_ray.config.messages import (
    explain_choice,
    explain_errors,
    explain_unknown_key,
    find_closest,
    format_path,
    format_value,
)
from corun_ray.config.reference import ORDER, accepts_key
from corun_ray.config.trials import find_search_mistakes
from corun_ray.config.yaml_reader import Dumper, Loader, Loc, Reader, locate_syntax_error
from corun_ray.core.errors import UserError


class JobFileError(UserError):
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
            document.tell(("name",), f"{format_value(name)} is the name of job {first} as well")
        label = name if isinstance(name, str) and names.count(name) == 1 else number
        if document.kind == "serve" and number < len(documents):
            document.tell(("kind",), "serve runs until it is stopped, so it must be the last job of its file")
        lines += [f"job {label}: {line}" if len(documents) > 1 else line for line in document.lines()]
        jobs += [job] if job else []
    if lines:
        raise JobFileError(lines)
    return jobs


def build_job(tree: Mapping[str, Any]) -> Job:
    """The job of plain values, as a file would have them; raises JobFileError."""
    document = _Document(dict(tree), {})
    job = document.validate()
    if job is None:
        raise JobFileError(document.lines())
    return job


def dump_job(job: Job) -> str:
    """The resolved job as YAML, with every key that its kind uses; `load_jobs` reads an equal job from it."""
    values = job.model_dump()
    ordered = {key: values[key] for key in ORDER if key in values}
    return yaml.dump(ordered, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


@dataclass
class _Document:
    """One YAML document as plain values, and what has been found wrong with it so far."""

    raw: dict[str, Any]
    mistakes: dict[Loc, str]

    @property
    def kind(self) -> str:
        """The kind that is written or probably meant, else the one that has most of the keys."""
        likeliest = max(KINDS, key=lambda kind: len(self.raw.keys() & KINDS[kind].model_fields.keys()))
        return find_closest(self.raw.get("kind"), KINDS) or likeliest

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
            self.tell(("kind",), explain_choice(written, KINDS))
        try:
            job = KINDS[kind].model_validate(self.raw | {"kind": kind})
            for loc, text in find_search_mistakes(job).items() if isinstance(job, TuneJob) else ():
                self.tell(loc, text)
            return job
        except ValidationError as error:
            errors = error.errors(include_url=False)
        for loc, text in explain_errors(errors, kind, is_sure=find_closest(written, KINDS) is not None):
            self.tell(loc, text)
        return None

    def lines(self) -> list[str]:
        """One line for each mistake, in the order in which a job's keys are listed."""
        place = {key: position for position, key in enumerate(ORDER)}
        mistakes = sorted(self.mistakes.items(), key=lambda mistake: place.get(str(mistake[0][0]), len(place)))
        return [f"{format_path(loc)}: {text}" for loc, text in mistakes]


def _read(path: Path, env: Mapping[str, str]) -> list[_Document]:
    try:
        reader = Reader(path.read_text("utf-8"), env)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise JobFileError([f"{path}:{line}: not a text file (UTF-8)"]) from error
    except OSError as error:
        raise JobFileError([f"{path}: {(error.strerror or str(error)).lower()}"]) from error
    documents, lines = [], []
    try:
        for node in yaml.compose_all(reader.text, Loader):
            reader.mistakes = {}
            raw = reader.value(node)
            if isinstance(raw, dict):
                documents.append(_Document(raw, reader.mistakes))
            elif raw is not None:
                what = "a list" if isinstance(raw, tuple) else "a single value"
                lines.append(f"{path}:{node.start_mark.line + 1}: {what}, not a mapping of keys (kind, name, ...)")
    except yaml.YAMLError as error:
        line, reason = locate_syntax_error(error, reader.text)
        raise JobFileError([f"{path}:{line}: not valid YAML ({reason})"]) from error
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
    kinds = [kind for kind in KINDS if accepts_key(kind, path)]
    if not kinds:
        return [f"{path}: {explain_unknown_key(path, named[0].kind, used_elsewhere=False)}"]
    loc = tuple(path.split("."))
    reader = Reader(text, env)
    try:
        node = yaml.compose(reader.text, Loader)
        # A job of a pipeline that has no such key is left alone, unless none has it.
        for document in [d for d in named if d.kind in kinds] or named:
            reader.mistakes = {}
            document.put(loc, reader.value(node, loc) if node else "", reader.mistakes)
    except yaml.YAMLError as error:
        return [f"--set {setting}: not valid YAML ({locate_syntax_error(error, reader.text)[1]})"]
    return []
