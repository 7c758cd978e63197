"""Which network: a type and the arguments of its class, as plain data that travels and is stored beside its weights."""

import inspect
import json
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from corun_ray.core.errors import UserError, format_error

CORUN_TYPE = "corun"
TYPE_PATTERN = re.compile(r"[A-Za-z]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class NetworkError(UserError):
    """A network that cannot be made or does not fit its use; the message is one line."""


@dataclass(frozen=True)
class NetworkSpec:
    """All that it takes to build a network without its weights."""

    type: str
    """`corun`, the name of a class of spandrel (`NAFNet`, ...), or `module.path:ClassName`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class: plain JSON values (tuples become lists)."""

    def __post_init__(self) -> None:
        """Raises `NetworkError` for what is no type or no plain value."""
        if not isinstance(self.type, str) or not TYPE_PATTERN.fullmatch(self.type):
            raise NetworkError(f"{self.type!r} is no network type (corun, a class of spandrel, module.path:ClassName)")
        if not isinstance(self.args, dict):
            raise NetworkError(f"{self.type}: args are {type(self.args).__name__}, not a mapping of names to values")
        try:
            plain = json.loads(json.dumps(self.args, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise NetworkError(f"{self.type}: args are not plain values ({format_error(error)})") from None
        object.__setattr__(self, "args", plain)

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps({"type": self.type, "args": self.args}, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> "NetworkSpec":
        """Reads `{"type": ..., "args": {...}}` and nothing else; raises `NetworkError`."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise NetworkError(f"not JSON ({format_error(error)})") from None
        if not isinstance(content, dict) or content.keys() != {"type", "args"}:
            raise NetworkError("not a network's description: an object of exactly `type` and `args` was expected")
        return cls(content["type"], content["args"])


def construct(network_class: type[nn.Module], spec: NetworkSpec) -> nn.Module:
    """An instance of the class with the arguments of `spec`; raises `NetworkError` with what the class accepts."""
    try:
        return network_class(**spec.args)
    except Exception as error:
        accepted = ", ".join(inspect.signature(network_class).parameters) or "none"
        raise NetworkError(f"{spec.type} refuses its args ({format_error(error)}); it takes {accepted}") from None


PAD_MULTIPLE_PX = 16
"""The published recipe pads to 16, though 8 would do."""


def compute_padded_size(network: nn.Module, height: int, width: int) -> tuple[int, int]:
    """The least height and width in pixels, not below those of the image, that the network takes."""
    multiple = getattr(network, "size_multiple_px", PAD_MULTIPLE_PX)
    least = getattr(network, "size_min_px", 0)
    height, width = (-(-max(side, least) // multiple) * multiple for side in (height, width))
    return (max(height, width),) * 2 if getattr(network, "size_square", False) else (height, width)
