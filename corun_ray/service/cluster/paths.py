"""The folders and URIs that a job file names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from corun_ray.config.jobs import Job
from corun_ray.service.storage import locate

FOLDER_KEYS = (
    "storage",
    "data.clear",
    "data.depth",
    "data.hazy",
    "data.paired.hazy",
    "data.paired.clear",
    "data.validation.hazy",
    "data.validation.clear",
    "data.validation.transmission",
    "data.validation_sets.*.hazy",
    "data.validation_sets.*.clear",
    "data.validation_sets.*.transmission",
    "coherence.weights",
    "loss.weights",
    "train.validation_weights",
    "evaluate.hazy",
    "evaluate.clear",
    "evaluate.weights",
    "evaluate.boxes",
    "dehaze.input",
    "dehaze.output",
    "depth.input",
    "depth.output",
    "depth.weights",
)
"""Keys of a job file that name folders or URIs; `*` stands for every key at its place."""


@dataclass(frozen=True)
class _FolderKey:
    """A key of a job that names a folder: the section that holds it, and its whole path."""

    section: dict[str, Any]
    key: str
    path: str

    @property
    def value(self) -> str:
        """The folder or URI."""
        return self.section[self.key]


def make_paths_absolute(job: Job) -> Job:
    """Return the job with absolute folders.

    Workers do not run in the driver's folder.
    """
    tree = job.model_dump()
    for folder in _find_folders(tree):
        folder.section[folder.key] = locate(folder.value).uri

    # Folders among which a search chooses.
    search = tree.get("tune", {}).get("search", {})
    for path, choices in _find_searched_folders(tree).items():
        search[path] = tuple(locate(choice).uri for choice in choices)

    return type(job).model_validate(tree)


def list_folders(job: Job) -> list[tuple[str, str]]:
    """List every folder or URI that the job names.

    Each comes after the path of its key.
    """
    tree = job.model_dump()
    folders = [(folder.path, folder.value) for folder in _find_folders(tree)]
    for path, choices in _find_searched_folders(tree).items():
        for choice in choices:
            folders.append((f"tune.search.{path}", choice))
    return folders


def _find_searched_folders(tree: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the folders among which a search chooses.

    They are given by the path of their key.
    """
    found = {}
    for path, choices in tree.get("tune", {}).get("search", {}).items():
        if path in FOLDER_KEYS and isinstance(choices, tuple):
            found[path] = choices
    return found


def _find_folders(tree: dict[str, Any]) -> Iterator[_FolderKey]:
    """Yield the keys of a job that name a folder."""
    # An optional folder that is not given has no value.
    for path in FOLDER_KEYS:
        *names, key = path.split(".")
        for section, prefix in _find_sections(tree, names):
            if section.get(key):
                yield _FolderKey(section, key, f"{prefix}{key}")


def _find_sections(tree: dict[str, Any], names: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """Return the sections at a path, each with its own.

    The list is empty where the job has no such section.
    """
    found = [(tree, "")]
    for name in names:
        # Go one level deeper: into one section, or into all of them for `*`.
        deeper = []
        for section, prefix in found:
            keys = list(section) if name == "*" else [name]
            for key in keys:
                if section.get(key):
                    deeper.append((section[key], f"{prefix}{key}."))

        found = deeper

    return found
