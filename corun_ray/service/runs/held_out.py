"""What a run knows of its held-out images: every value of every validation, and pictures of some."""

import csv
import io
from collections.abc import Sequence

from corun_ray.service.train.gallery import Measured

VALIDATION_FILE = "validation.csv"
HEAD = ["step", "set", "image", "metric", "value"]

Key = tuple[int, str, str, str]
"""Step, set, image and metric."""


class ValidationLog:
    """The values as rows, whatever order they come in; a validation that is repeated replaces what it was."""

    def __init__(self, values: dict[Key, float] | None = None) -> None:
        self.values = values or {}

    def add(self, step: int, measured: Sequence[Measured]) -> None:
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
