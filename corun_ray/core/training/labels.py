"""The optimal label pool's record and rule, pure: no process, no storage.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from corun_ray.core.choices import Encoding


class Scores(NamedTuple):
    """The global coherence of a label, each in [0, 1], higher is better."""

    clarity: float
    quality: float


@dataclass(frozen=True)
class Label:
    """A pseudo label of one hazy image, its arrays as stored (see `encode`)."""

    key: str
    """The image's path relative to its data root."""
    scores: Scores
    step: int
    """The training step whose teacher made it."""
    scene: np.ndarray
    """J*, 3 H W."""
    transmission: np.ndarray | None
    """T*, 1 H W; None if the network has none."""
    block_clarity: np.ndarray
    """h w, float32; the trust map follows from the two block scores."""
    block_quality: np.ndarray
    """h w, float32."""

    @property
    def size_bytes(self) -> int:
        """What its arrays take in memory."""
        arrays = (self.scene, self.transmission, self.block_clarity, self.block_quality)
        return sum(array.nbytes for array in arrays if array is not None)


def encode(unit: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Values in [0, 1] as stored: `uint8` rounds to 1/255, `float16` to 11 bits, `float32` is exact."""
    if encoding == "uint8":
        return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
    return unit.astype(encoding)


def decode(stored: np.ndarray) -> np.ndarray:
    """Stored values of any encoding → float32 in [0, 1]."""
    scale = np.float32(1 / 255) if stored.dtype == np.uint8 else np.float32(1)
    return stored.astype(np.float32) * scale


def supersedes(candidate: Scores, stored: Scores | None) -> bool:
    """Whether a candidate enters the pool: none is stored yet, or both scores are at least as good."""
    return stored is None or (candidate.clarity >= stored.clarity and candidate.quality >= stored.quality)


class PendingLabels(Protocol):
    """A read of the pool that is under way."""

    def result(self) -> list[Label | None]:
        """One entry a key asked for, None where the pool held no label."""


class LabelPool(Protocol):
    """What a training step needs of a pool, wherever it lives."""

    def prefetch(self, keys: Sequence[str]) -> PendingLabels:
        """Starts reading the labels of `keys`."""

    def offer(self, labels: Sequence[Label]) -> None:
        """Hands over candidates; the pool compares each again and keeps the better."""


class ReadyLabels(list["Label | None"]):
    """Labels that are already here."""

    def result(self) -> list[Label | None]:
        """See `PendingLabels`."""
        return self


class LocalPool:
    """A label pool in this process's memory: for notebooks, single machines and tests."""

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        self.labels = {label.key: label for label in labels}

    def prefetch(self, keys: Sequence[str]) -> ReadyLabels:
        """See `LabelPool`."""
        return ReadyLabels(self.labels.get(key) for key in keys)

    def offer(self, labels: Sequence[Label]) -> None:
        """See `LabelPool`."""
        for label in labels:
            stored = self.labels.get(label.key)
            if supersedes(label.scores, stored.scores if stored else None):
                self.labels[label.key] = label
