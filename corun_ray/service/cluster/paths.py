"""The folders and URIs that a job file names, and what they mean on another machine."""

from collections.abc import Iterator, Sequence
from typing import Any

from corun_ray.config.jobs import Job
from corun_ray.service.storage import locate

FOLDERS = (
    *("storage", "data.clear", "data.depth", "data.hazy", "data.paired.hazy", "data.paired.clear"),
    *("data.validation.hazy", "data.validation.clear"),
    *("data.validation_sets.*.hazy", "data.validation_sets.*.clear"),
    *("coherence.weights", "loss.weights", "evaluate.hazy", "evaluate.clear", "evaluate.weights"),
    *("dehaze.input", "dehaze.output"),
)
"""The keys of a job file that name folders or URIs; `*` is every key at its place."""


def make_paths_absolute(job: Job) -> Job:
    """The job with its folders absolute: workers do not run where the driver does."""
    tree = job.model_dump()
    for section, key, _ in _places(tree):
        section[key] = locate(section[key]).uri
    for path, choice in tree.get("tune", {}).get("search", {}).items():
        if path in FOLDERS and isinstance(choice, tuple):
            tree["tune"]["search"][path] = tuple(locate(value).uri for value in choice)
    return type(job).model_validate(tree)


def list_folders(job: Job) -> list[tuple[str, str]]:
    """Every folder or URI that the job names, after its key's path."""
    tree = job.model_dump()
    found = [(path, section[key]) for section, key, path in _places(tree)]
    searched = tree.get("tune", {}).get("search", {}).items()
    choices = [(path, choice) for path, choice in searched if path in FOLDERS and isinstance(choice, tuple)]
    return found + [(f"tune.search.{path}", value) for path, choice in choices for value in choice]


def _places(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The sections of a job that name a folder, with the key in each that does and its whole path."""
    for path in FOLDERS:
        *names, key = path.split(".")
        for section, prefix in _sections(tree, names):
            if section.get(key):
                yield section, key, f"{prefix}{key}"


def _sections(tree: dict[str, Any], names: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """The sections at a path, each with its own; none where the job leaves it out."""
    found = [(tree, "")]
    for name in names:
        found = [
            (section[key], f"{prefix}{key}.")
            for section, prefix in found
            for key in (section if name == "*" else [name])
            if section.get(key)
        ]
    return found
