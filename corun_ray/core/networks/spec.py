"""The description of a network: its type and the arguments of its class.

A description is plain data. It travels to workers, and it is stored beside the network's weights.
"""

import inspect
import json
import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from corun_ray.core.errors import UserError, format_error

CORUN_TYPE = "corun"
TYPE_PATTERN = re.compile(r"[A-Za-z]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*")

PAD_MULTIPLE_PX = 16
"""The sides of a padded image are multiples of this. The published recipe pads to 16, though CORUN needs only 8."""


class NetworkError(UserError):
    """A network that cannot be built or does not fit its use; the message is one line."""


@dataclass(frozen=True)
class NetworkSpec:
    """Everything needed to build a network, except its weights."""

    type: str
    """`corun`, the name of a class of spandrel (`NAFNet`, ...), or `module.path:ClassName`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class: plain JSON values (tuples become lists)."""

    def __post_init__(self) -> None:
        """Check the type and normalise the arguments.

        Raises `NetworkError` where the type is malformed, or where an argument is not a plain JSON value.
        """
        if not isinstance(self.type, str) or not TYPE_PATTERN.fullmatch(self.type):
            raise NetworkError(f"{self.type!r} is no network type (corun, a class of spandrel, module.path:ClassName)")
        if not isinstance(self.args, dict):
            raise NetworkError(f"{self.type}: args are {type(self.args).__name__}, not a mapping of names to values")

        # A round trip through JSON checks the arguments, and gives a spec the same values before and after storage.
        try:
            plain = json.loads(json.dumps(self.args, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise NetworkError(f"{self.type}: args are not plain values ({format_error(error)})") from None
        object.__setattr__(self, "args", plain)

    def to_json(self) -> str:
        """Write the description as JSON, for `from_json`."""
        return json.dumps({"type": self.type, "args": self.args}, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> "NetworkSpec":
        """Read an object of exactly `type` and `args`.

        Raises `NetworkError` for any other content.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise NetworkError(f"not JSON ({format_error(error)})") from None

        if not isinstance(content, dict) or content.keys() != {"type", "args"}:
            raise NetworkError("not a network's description: an object of exactly `type` and `args` was expected")
        return cls(content["type"], content["args"])


def construct(network_class: type[nn.Module], spec: NetworkSpec) -> nn.Module:
    """Create an instance of a class with the arguments of `spec`.

    Raises `NetworkError`, whose message names the arguments that the class accepts.
    """
    try:
        return network_class(**spec.args)
    except Exception as error:
        accepted = ", ".join(inspect.signature(network_class).parameters) or "none"
        raise NetworkError(f"{spec.type} refuses its args ({format_error(error)}); it takes {accepted}") from None


def compute_padded_size(network: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Return the size in pixels to which an image is padded.

    A network states its needs in optional attributes: `size_multiple_px` (else `PAD_MULTIPLE_PX`), `size_min_px` and
    `size_square`. Neither side is ever smaller than the image's.
    """
    multiple_px = getattr(network, "size_multiple_px", PAD_MULTIPLE_PX)
    min_px = getattr(network, "size_min_px", 0)

    height = _round_up(_take_larger(height, min_px), multiple_px)
    width = _round_up(_take_larger(width, min_px), multiple_px)

    if getattr(network, "size_square", False):
        side = _take_larger(height, width)
        return side, side
    return height, width


def _take_larger(first_px: int, second_px: int) -> int:
    """Return the larger side; torch's maximum stays free where a network is exported with sizes not known yet."""
    return cast(int, torch.sym_max(first_px, second_px))


def _round_up(side_px: int, multiple_px: int) -> int:
    """Return the smallest multiple that is not below `side_px`."""
    # No negative number is divided: ONNX would round its quotient up, not down.
    return (side_px + multiple_px - 1) // multiple_px * multiple_px
