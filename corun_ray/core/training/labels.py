"""The optimal label pool: its labels, its rule, and what a training step needs of any pool.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.2. The pool keeps, for each hazy image, the best pseudo
label so far. A candidate replaces the stored label only if neither of its scores is lower. This file is pure: it starts
no process and touches no storage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from corun_ray.core.choices import Encoding


class Scores(NamedTuple):
    """The global coherence of a label; each score is in [0, 1], higher is better."""

    clarity: float
    quality: float


@dataclass(frozen=True)
class Label:
    """A pseudo label of one hazy image, its arrays as stored (see `encode`)."""

    key: str
    """The path of the image, relative to its data root."""
    scores: Scores
    step: int
    """The training step in which the teacher made the label."""
    scene: np.ndarray
    """J*, `3 H W`."""
    transmission: np.ndarray | None
    """T*, `1 H W`; None if the network has none."""
    block_clarity: np.ndarray
    """c*, `h w`, float32. The trust map w* follows from the two block scores."""
    block_quality: np.ndarray
    """q*, `h w`, float32."""

    @property
    def size_bytes(self) -> int:
        """The memory that the arrays take."""
        arrays = (self.scene, self.transmission, self.block_clarity, self.block_quality)
        return sum(array.nbytes for array in arrays if array is not None)


def encode(unit: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Encode values in [0, 1] for storage.

    `uint8` rounds to 1/255, `float16` to 11 bits, and `float32` is exact.
    """
    if encoding == "uint8":
        return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return unit.astype(encoding)


def decode(stored: np.ndarray) -> np.ndarray:
    """Decode stored values of any encoding to float32 in [0, 1]."""
    scale = np.float32(1 / 255) if stored.dtype == np.uint8 else np.float32(1)
    return stored.astype(np.float32) * scale


def supersedes(candidate: Scores, stored: Scores | None) -> bool:
    """Decide whether a candidate enters the pool (section 3.2).

    A candidate enters if the image has no label yet, or if both scores are at least as good as the stored label's.
    """
    if stored is None:
        return True
    return candidate.clarity >= stored.clarity and candidate.quality >= stored.quality


def surpasses(candidate: Scores, rejected: Scores) -> bool:
    """Decide whether a candidate is better than a label that a person has rejected.

    No score is lower, and one at least is higher: the same label, made again, does not come back.
    """
    return supersedes(candidate, rejected) and candidate != rejected


class PendingLabels(Protocol):
    """A read of the pool that is under way."""

    def result(self) -> list[Label | None]:
        """Wait for the labels, one for each requested key.

        None stands where the pool holds no label.
        """


class LabelPool(Protocol):
    """The interface of a label pool to a training step, wherever the pool lives."""

    def prefetch(self, keys: Sequence[str]) -> PendingLabels:
        """Start reading the labels of `keys`."""

    def offer(self, labels: Sequence[Label]) -> None:
        """Offer candidates to the pool.

        The pool compares each once more by `supersedes`.
        """


class ReadyLabels(list["Label | None"]):
    """Labels that need no waiting."""

    def result(self) -> list[Label | None]:
        """Return the labels; see `PendingLabels`."""
        return self


class LocalPool:
    """A label pool in the memory of this process: for notebooks, single machines and tests."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        self.labels = {label.key: label for label in labels}

    def prefetch(self, keys: Sequence[str]) -> ReadyLabels:
        """Read the labels of `keys`; see `LabelPool`."""
        return ReadyLabels(self.labels.get(key) for key in keys)

    def offer(self, labels: Sequence[Label]) -> None:
        """Keep those candidates that supersede the stored labels; see `LabelPool`."""
        for label in labels:
            stored = self.labels.get(label.key)
            if supersedes(label.scores, stored.scores if stored else None):
                self.labels[label.key] = label
