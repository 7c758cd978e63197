"""Numbers that are not finite: in a network's weights, and in what a network makes of an image."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NotFinite(ValueError):
    """A restoration with NaN or infinite values; the message is one line."""


def find_bad_weight(weights: Mapping[str, Tensor], network: nn.Module) -> str | None:
    """Find the first of a network's weights that is not finite.

    `weights` is a state dict of `network`. Returns `NAME is nan` or `NAME is inf`; None where all parameters are
    finite, and no buffer has NaN. A buffer may be infinite: masks of attention are.
    """
    parameters = {name for name, _ in network.named_parameters()}
    for name, tensor in weights.items():
        is_bad = tensor.isnan() if name not in parameters else ~tensor.isfinite()
        if is_bad.any():
            return f"{name} is {describe_not_finite(tensor)}"
    return None


def describe_not_finite(values: Tensor) -> str:
    """Describe a tensor that is not finite: `nan`, or else `inf`."""
    return "nan" if values.isnan().any() else "inf"


def refuse_not_finite(values: Tensor, what: str) -> None:
    """Raise `NotFinite` for values that are not finite; `what` names them.

    A graph that is being exported or compiled has no exceptions, so nothing is checked there.
    """
    if torch.compiler.is_compiling():
        return
    finite = values.isfinite()
    if not finite.all():
        num_bad = int((~finite).sum())
        raise NotFinite(f"{what} is {describe_not_finite(values)} at {num_bad} of {values.numel()} values, not finite")
