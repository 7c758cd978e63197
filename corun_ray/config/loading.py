"""Read job files: YAML, the environment and `--set`.

All mistakes of a file are reported at once, in one plain line each.
"""

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

SETTING = re.compile(r"(?:([^=:]+):)?([^=:]+)=(.*)", re.DOTALL)
"""A value of `--set`: `key.path=value` or `job:key.path=value`."""


class JobFileError(UserError):
    """All mistakes of a job file: `lines` has one for each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


def load_jobs(path: Path, overrides: Sequence[str] = (), env: Mapping[str, str] = os.environ) -> list[Job]:
    """Load the jobs of a file, one for each document.

    `overrides` are `key.path=value` for every job that has the key, or `job:key.path=value` for the job of that name;
    the value is YAML. `${VAR}` and `${VAR:-default}` are filled in from `env`. A value that is an interpolation and
    nothing else takes the type that its text has in YAML.

    Raises `JobFileError` with the mistakes of all documents.
    """
    documents = _read_documents(path, env)
    lines = []
    for setting in overrides:
        lines += _apply_setting(documents, setting, env)

    # Validate each document, then note the mistakes that depend on the others.
    names = [document.raw.get("name") for document in documents]
    jobs = []
    for number, (document, name) in enumerate(zip(documents, names, strict=True), 1):
        job = document.validate()
        first = names.index(name) + 1
        if first < number and isinstance(name, str):
            document.note(("name",), f"{format_value(name)} is the name of job {first} as well")
        if document.kind == "serve" and number < len(documents):
            document.note(("kind",), "serve runs until it is stopped, so it must be the last job of its file")

        # With several jobs, a line names its job: by its name if that is unique, else by its number.
        label = name if isinstance(name, str) and names.count(name) == 1 else number
        prefix = f"job {label}: " if len(documents) > 1 else ""
        lines += [f"{prefix}{line}" for line in document.format_mistakes()]
        if job is not None:
            jobs.append(job)

    if lines:
        raise JobFileError(lines)
    return jobs


def build_job(tree: Mapping[str, Any]) -> Job:
    """Build a job from plain values, as in a file.

    Raises `JobFileError`.
    """
    document = _Document(dict(tree), {})
    job = document.validate()
    if job is None:
        raise JobFileError(document.format_mistakes())
    return job


def dump_job(job: Job) -> str:
    """Return the job as YAML, with every key.

    `load_jobs` reads an equal job from the YAML.
    """
    values = job.model_dump()
    ordered = {key: values[key] for key in ORDER if key in values}
    return yaml.dump(ordered, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


@dataclass
class _Document:
    """One YAML document as plain values, with its mistakes so far by place."""

    raw: dict[str, Any]
    mistakes: dict[Loc, str]

    @property
    def kind(self) -> str:
        """The kind that is written or probably meant.

        Without such a kind, the kind that has most of the keys.
        """
        meant = find_closest(self.raw.get("kind"), KINDS)
        if meant:
            return meant
        return max(KINDS, key=lambda kind: len(self.raw.keys() & KINDS[kind].model_fields.keys()))

    def put(self, loc: tuple[str, ...], value: Any, mistakes: dict[Loc, str]) -> None:
        """Replace one value and its mistakes."""
        # Walk down to the section of the key; create the sections that are absent.
        section = self.raw
        for key in loc[:-1]:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                return  # validation will say that this is not a mapping of keys
        section[loc[-1]] = value

        # Mistakes at the key and below it go with the old value.
        kept = {at: text for at, text in self.mistakes.items() if at[: len(loc)] != loc}
        self.mistakes = kept | mistakes

    def note(self, loc: Loc, text: str) -> None:
        """Note a mistake, unless its place has one already."""
        self.mistakes.setdefault(loc, text)

    def validate(self) -> Job | None:
        """Return the job, or None; note all mistakes."""
        kind = self.kind
        written = self.raw.get("kind")
        if "kind" not in self.raw:
            self.note(("kind",), f"missing ({', '.join(KINDS)})")
        elif written != kind:
            self.note(("kind",), explain_choice(written, KINDS))

        # Validate by the kind that is probably meant, so that all mistakes are found at once.
        try:
            job = KINDS[kind].model_validate(self.raw | {"kind": kind})
        except ValidationError as error:
            is_sure = find_closest(written, KINDS) is not None
            for loc, text in explain_errors(error.errors(include_url=False), kind, is_sure):
                self.note(loc, text)
            return None

        # A search is only right if all of its trials are.
        if isinstance(job, TuneJob):
            for loc, text in find_search_mistakes(job).items():
                self.note(loc, text)
        return job

    def format_mistakes(self) -> list[str]:
        """Return the mistakes' lines in the order of keys."""
        place = {key: position for position, key in enumerate(ORDER)}
        mistakes = sorted(self.mistakes.items(), key=lambda mistake: place.get(str(mistake[0][0]), len(place)))
        return [f"{format_path(loc)}: {text}" for loc, text in mistakes]


def _read_documents(path: Path, env: Mapping[str, str]) -> list[_Document]:
    """Read the documents of a file.

    Raises `JobFileError` where the file cannot be read or a document is no mapping.
    """
    # The text.
    try:
        reader = Reader(path.read_text("utf-8"), env)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise JobFileError([f"{path}:{line}: not a text file (UTF-8)"]) from error
    except OSError as error:
        raise JobFileError([f"{path}: {(error.strerror or str(error)).lower()}"]) from error

    # Its documents; empty ones are skipped.
    documents, lines = [], []
    try:
        for node in yaml.compose_all(reader.text, Loader):
            reader.mistakes = {}
            raw = reader.read(node)
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


def _apply_setting(documents: Sequence[_Document], setting: str, env: Mapping[str, str]) -> list[str]:
    """Apply one `--set`; return the mistakes of the setting itself."""
    match = SETTING.fullmatch(setting)
    if not match:
        return [f"--set {setting}: not key.path=value or job:key.path=value"]

    # Find the documents of that name, or all.
    name, path, text = match.groups()
    named = [document for document in documents if name in (None, document.raw.get("name"))]
    if not named:
        names = ", ".join(str(document.raw.get("name")) for document in documents)
        return [f"--set {setting}: no job is named {name} (the jobs are {names})"]

    # Find the kinds that have the key.
    kinds = [kind for kind in KINDS if accepts_key(kind, path)]
    if not kinds:
        return [f"{path}: {explain_unknown_key(path, named[0].kind, used_elsewhere=False)}"]

    # Put the value into the documents of such kinds. Where none is of such a kind, validation reports the key.
    targets = [document for document in named if document.kind in kinds]
    loc = tuple(path.split("."))
    reader = Reader(text, env)
    try:
        node = yaml.compose(reader.text, Loader)
        for document in targets if targets else named:
            reader.mistakes = {}
            document.put(loc, reader.read(node, loc) if node else "", reader.mistakes)
    except yaml.YAMLError as error:
        return [f"--set {setting}: not valid YAML ({locate_syntax_error(error, reader.text)[1]})"]
    return []
