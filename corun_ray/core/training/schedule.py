"""The learning rate of every step: linear warm-up, then cosine with restarts.

Source: Loshchilov and Hutter, SGDR, ICLR 2017. The published recipe is one cycle without warm-up (arXiv 2406.07966).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Cycle(NamedTuple):
    """A fall by half a cosine from `lr` to `min_lr` over `steps` (at least 1) steps; constant where both are equal."""

    steps: int
    lr: float
    min_lr: float


def learning_rate(step: int, cycles: Sequence[Cycle], warmup_steps: int = 0) -> float:
    """The learning rate of 0-based `step`: the cycles one after the other, then the last one's `min_lr`.

    Warm-up is a factor on that schedule: 1 / `warmup_steps` at step 0, rising by as much every step until it is 1 at
    step `warmup_steps` - 1. So it moves no restart. Raises `ValueError` where there is no cycle.
    """
    if not cycles:
        raise ValueError("learning rate: at least one cycle expected")
    warmth = min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
    return warmth * _cosine(step, cycles)


def _cosine(step: int, cycles: Sequence[Cycle]) -> float:
    for steps, lr, min_lr in cycles:
        if step < steps:
            progress = step / steps
            return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        step -= steps
    return cycles[-1].min_lr
