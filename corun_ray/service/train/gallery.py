"""Held-out images measured one by one, and which of them are kept as pictures."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from corun_ray.core.inference.pictures import ImageU8, thumbnail

PICTURE_PX = 640


@dataclass(frozen=True)
class Pictures:
    """What went into the network and what came out, as small JPEGs of the same size."""

    hazy: bytes
    output: bytes


@dataclass(frozen=True)
class Measured:
    """One held-out image at one validation."""

    prefix: str
    """Its set: `val`, or `val/NAME`."""
    image: str
    values: dict[str, float]
    """By metric."""
    pictures: Pictures | None = None
    """None for most images."""


class Gallery:
    """Keeps the pictures of named images and of the best and worst by each metric, and no others' in memory."""

    def __init__(self, shown: set[str]) -> None:
        self._shown = shown
        self._measured: list[Measured] = []
        self._kept: dict[str, Pictures] = {}
        self._extremes: dict[tuple[str, int], tuple[float, str]] = {}
        """(metric, +1 the highest or -1 the lowest) → (value times that sign, image)."""

    def add(self, measured: Measured, look: Callable[[], tuple[ImageU8, ImageU8]]) -> None:
        """One more image; `look` gives what went in and what came out, and is called only if they are kept."""
        self._measured.append(measured)
        for metric, value in measured.values.items():
            for sign in (1, -1) if not math.isnan(value) else ():
                if (metric, sign) not in self._extremes or sign * value > self._extremes[metric, sign][0]:
                    self._extremes[metric, sign] = (sign * value, measured.image)
        wanted = self._shown | {image for _, image in self._extremes.values()}
        if measured.image in wanted:
            self._kept[measured.image] = Pictures(*(thumbnail(picture, PICTURE_PX) for picture in look()))
        self._kept = {image: pictures for image, pictures in self._kept.items() if image in wanted}

    def measured(self) -> list[Measured]:
        """All of them, with the pictures that were kept."""
        return [replace(one, pictures=self._kept.get(one.image)) for one in self._measured]
