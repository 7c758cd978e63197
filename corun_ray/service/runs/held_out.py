"""The validation images in a run's folder: every value of every validation, and pictures of some images.

`validation.csv` has the values. `examples/SET/IMAGE/` has the hazy picture and one restored picture a validation.
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from corun_ray.service.storage import Location

VALIDATION_FILE = "validation.csv"
COLUMNS = ["step", "set", "image", "metric", "value"]
EXAMPLES = "examples"
HAZY_PICTURE = "hazy.jpg"
RESTORED_PICTURE = re.compile(r"(.+)/step_(\d{8,})\.jpg")

Key = tuple[int, str, str, str]
"""Step, set, image and metric."""


@dataclass(frozen=True)
class PicturePair:
    """Input and output of the network, as small JPEGs of the same size."""

    hazy: bytes
    output: bytes


@dataclass(frozen=True)
class MeasuredImage:
    """One validation image at one validation."""

    prefix: str
    """Its set: `val`, or `val/NAME`."""
    image: str
    values: dict[str, float]
    """By metric."""
    pictures: PicturePair | None = None
    """None for most images."""


@dataclass(frozen=True)
class Example:
    """One validation image before and after restoration, as JPEGs of the same size."""

    name: str
    """`SET/IMAGE`."""
    hazy: bytes
    output: bytes


class ValidationLog:
    """Every value of every validation. A validation that is repeated replaces its earlier values."""

    def __init__(self, values: dict[Key, float] | None = None) -> None:
        self.values = {} if values is None else values

    def add(self, step: int, measured: Sequence[MeasuredImage]) -> None:
        """Add images of the validation after `step` steps."""
        for one in measured:
            for metric, value in one.values.items():
                self.values[step, one.prefix, one.image, metric] = value

    @property
    def last_step(self) -> int | None:
        """The step of the last validation."""
        return max((step for step, *_ in self.values), default=None)

    def at(self, step: int) -> dict[tuple[str, str], dict[str, float]]:
        """Return (set, metric) → image → value after `step` steps."""
        # Sorted keys: sets, metrics and images come in a fixed order.
        found: dict[tuple[str, str], dict[str, float]] = {}
        for (at, prefix, image, metric), value in sorted(self.values.items()):
            if at == step:
                found.setdefault((prefix, metric), {})[image] = value
        return found

    def until(self, step: int) -> "ValidationLog":
        """Return the validations up to `step` steps."""
        return ValidationLog({key: value for key, value in self.values.items() if key[0] <= step})

    def compare_steps(self, name: str) -> dict[int, float]:
        """Return the mean of a metric such as `val/psnr` at each step, over the same images at all steps.

        Left out are steps that measured other images than the last one, and steps without any finite value; then
        images without a finite value at one of the other steps.
        """
        prefix, _, metric = name.rpartition("/")
        by_step: dict[int, dict[str, float]] = {}
        for (step, one_prefix, image, one_metric), value in sorted(self.values.items()):
            if (one_prefix, one_metric) == (prefix, metric):
                by_step.setdefault(step, {})[image] = value
        if not by_step:
            return {}

        # Steps that can be compared, and the images that have a finite value at all of them.
        images = by_step[max(by_step)].keys()
        steps = []
        for step, values in by_step.items():
            if values.keys() == images and any(map(math.isfinite, values.values())):
                steps.append(step)
        common = [image for image in images if all(math.isfinite(by_step[step][image]) for step in steps)]
        if not common:
            return {}
        return {step: statistics.fmean([by_step[step][image] for image in common]) for step in steps}

    def to_csv(self) -> bytes:
        """Write the values as CSV, one a row."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(COLUMNS)

        # Sorted: the same values always give the same file.
        for key, value in sorted(self.values.items()):
            writer.writerow([*key, f"{value:.8g}"])
        return text.getvalue().encode()

    @classmethod
    def from_csv(cls, content: bytes) -> "ValidationLog":
        """Read the output of `to_csv`.

        Raises ValueError for other columns.
        """
        head, *rows = csv.reader(io.StringIO(content.decode()))
        if head != COLUMNS:
            raise ValueError(f"columns are {', '.join(head)}, not {', '.join(COLUMNS)}")

        values: dict[Key, float] = {}
        for step, prefix, image, metric, value in rows:
            values[int(step), prefix, image, metric] = float(value)
        return cls(values)


def name_picture(step: int) -> str:
    """Return the file name of an image restored after `step` steps."""
    return f"step_{step:08d}.jpg"


def find_pictured_steps(run: Location) -> dict[str, list[int]]:
    """Return `SET/IMAGE` → the steps that have a picture, in order.

    Raises `StorageError`.
    """
    place = run.child(EXAMPLES)
    if not place.exists():
        return {}

    # Listings come in order of paths, so the steps of an image come in order.
    found: dict[str, list[int]] = {}
    for path in place.list_files():
        match = RESTORED_PICTURE.fullmatch(path)
        if match:
            found.setdefault(match[1], []).append(int(match[2]))
    return found


def read_example(run: Location, name: str, step: int) -> Example:
    """Read the two pictures of the image `name` (`SET/IMAGE`) at a step.

    Raises `StorageError`.
    """
    folder = run.child(EXAMPLES).child(name)
    return Example(name, folder.child(HAZY_PICTURE).read(), folder.child(name_picture(step)).read())


def select_always_pictured(steps: dict[str, list[int]]) -> list[str]:
    """Select the images pictured at the most validations.

    These are the images chosen by the job, not the best or worst of a single validation.
    """
    most = max(map(len, steps.values()), default=0)
    return sorted(name for name, at in steps.items() if len(at) == most)


def read_examples(run: Location, step: int) -> list[Example]:
    """Read the always pictured images as restored after `step` steps.

    Raises `StorageError`.
    """
    # An image may lack a picture of this step although it has as many as the others.
    steps = find_pictured_steps(run)
    examples = []
    for name in select_always_pictured(steps):
        if step in steps[name]:
            examples.append(read_example(run, name, step))
    return examples
