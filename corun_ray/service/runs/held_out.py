"""What a run knows of its held-out images: every value of every validation, and pictures of some.

The pictures of held-out images in a run's folder: `examples/SET/IMAGE/`, the hazy one and one a validation."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from corun_ray.service.storage import Location

VALIDATION_FILE = "validation.csv"
HEAD = ["step", "set", "image", "metric", "value"]

Key = tuple[int, str, str, str]
"""Step, set, image and metric."""


@dataclass(frozen=True)
class PicturePair:
    """What went into the network and what came out, as small JPEGs of the same size."""

    hazy: bytes
    output: bytes


@dataclass(frozen=True)
class MeasuredImage:
    """One held-out image at one validation."""

    prefix: str
    """Its set: `val`, or `val/NAME`."""
    image: str
    values: dict[str, float]
    """By metric."""
    pictures: PicturePair | None = None
    """None for most images."""


class ValidationLog:
    """The values as rows, whatever order they come in; a validation that is repeated replaces what it was."""

    def __init__(self, values: dict[Key, float] | None = None) -> None:
        self.values = values or {}

    def add(self, step: int, measured: Sequence[MeasuredImage]) -> None:
        """Images of one validation."""
        for one in measured:
            self.values |= {(step, one.prefix, one.image, name): value for name, value in one.values.items()}

    @property
    def last_step(self) -> int | None:
        """The step of the last validation."""
        return max((step for step, *_ in self.values), default=None)

    def at(self, step: int) -> dict[tuple[str, str], dict[str, float]]:
        """(set, metric) → image → value at a step."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for (at, prefix, image, metric), value in sorted(self.values.items()):
            if at == step:
                found.setdefault((prefix, metric), {})[image] = value
        return found

    def to_csv(self) -> bytes:
        """The inverse of `from_csv`."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(HEAD)
        writer.writerows([*key, f"{value:.8g}"] for key, value in sorted(self.values.items()))
        return text.getvalue().encode()

    @classmethod
    def from_csv(cls, content: bytes) -> "ValidationLog":
        """Reads what `to_csv` wrote; raises ValueError for anything else."""
        head, *rows = csv.reader(io.StringIO(content.decode()))
        if head != HEAD:
            raise ValueError(f"columns are {', '.join(head)}, not {', '.join(HEAD)}")
        return cls({(int(step), prefix, image, metric): float(value) for step, prefix, image, metric, value in rows})


EXAMPLES = "examples"
HAZY_PICTURE = "hazy.jpg"
_PICTURE = re.compile(r"(.+)/step_(\d{8,})\.jpg")


@dataclass(frozen=True)
class Example:
    """One held-out image before and after, as JPEGs of the same size."""

    name: str
    """`SET/IMAGE`."""
    hazy: bytes
    output: bytes


def name_picture(step: int) -> str:
    """The file of what the network made of an image after `step` steps."""
    return f"step_{step:08d}.jpg"


def find_pictured_steps(run: Location) -> dict[str, list[int]]:
    """`SET/IMAGE` → the steps of which there is a picture, in order; raises `StorageError`."""
    place = run.child(EXAMPLES)
    found: dict[str, list[int]] = {}
    for path in place.list_files() if place.exists() else ():
        if match := _PICTURE.fullmatch(path):
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def read_example(run: Location, name: str, step: int) -> Example:
    """The pictures of one image; raises `StorageError`."""
    folder = run.child(EXAMPLES).child(name)
    return Example(name, folder.child(HAZY_PICTURE).read(), folder.child(name_picture(step)).read())


def select_always_pictured(steps: dict[str, list[int]]) -> list[str]:
    """The images that have a picture of the most validations: those that were chosen, not the best or worst of one."""
    most = max(map(len, steps.values()), default=0)
    return sorted(name for name, at in steps.items() if len(at) == most)


def read_examples(run: Location, step: int) -> list[Example]:
    """The images that are shown throughout the run, as they were after `step` steps; raises `StorageError`."""
    steps = find_pictured_steps(run)
    return [read_example(run, name, step) for name in select_always_pictured(steps) if step in steps[name]]
