"""Stopping a training at the first number that is not finite.

Such a number never becomes finite again: losses and gradients carry it into the weights, and scores into the label
pool.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from corun_ray.core.networks.finite import describe_not_finite


class Diverged(ArithmeticError):
    """A training step with a number that is not finite; the message names the step and the term.

    Nothing is gained by a second try: the same seed diverges again.
    """


class ScoreNotFinite(ArithmeticError):
    """A scorer that rates a finite image with NaN or infinity; the message names the step, the score and the image."""


def refuse_bad_score(score: float, what: str, key: str, step: int) -> None:
    """Refuse a score of an image that is not finite; `what` names the score.

    Raises `ScoreNotFinite`.
    """
    if not math.isfinite(score):
        raise ScoreNotFinite(f"step {step}: the {what} is {score} for the restoration of {key}, which is finite itself")


def measure_gradient(losses: Sequence[Mapping[str, Tensor]], network: nn.Module, step: int) -> Tensor:
    """Measure the norm of all gradients of a step, before they change any weight.

    `losses` are those of each part of the step. All numbers leave the device in one copy, so that a step waits for the
    device once.

    Raises `Diverged`, naming the first loss, or else the first parameter whose gradient is not finite.
    """
    # The norm is finite only where all gradients are.
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))

    # One copy from the device: every loss of every part, and the norm.
    terms: list[str] = []
    values: list[Tensor] = []
    for part in losses:
        terms += part.keys()
        values += [loss.float() for loss in part.values()]
    *found, found_norm = torch.stack([*values, norm.float()]).tolist()

    # The losses come first, since a bad loss makes bad gradients.
    for term, value in zip(terms, found, strict=True):
        if not math.isfinite(value):
            raise Diverged(f"step {step}: the loss {term} is {value}, not finite")
    if not math.isfinite(found_norm):
        raise Diverged(f"step {step}: {_describe_gradient(gradients, found_norm)}, not finite")
    return norm


def _describe_gradient(gradients: Mapping[str, Tensor], norm: float) -> str:
    """Name the first gradient that is not finite; the norm, where single gradients are finite and too large for it."""
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            return f"the gradient of {name} is {describe_not_finite(gradient)}"
    return f"the norm of all gradients is {norm}"
