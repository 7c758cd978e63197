"""The architectures of the spandrel package: their classes by name, and which of them a state dict belongs to.

spandrel deduces the arguments of a published checkpoint's network from the names and shapes of its tensors.
`spandrel_extra_arches` adds architectures (Restormer, ...) where it is installed.
"""

import difflib
import functools
import importlib.util
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from corun_ray.core.errors import format_error
from corun_ray.core.networks.spec import PAD_MULTIPLE_PX, NetworkError, NetworkSpec, construct

EXTRA_PACKAGE = "spandrel_extra_arches"
OWN_CLASS = "a network of your own needs its type (module.path:ClassName) and args"


def build_spandrel_network(spec: NetworkSpec) -> nn.Module:
    """The network of one of `list_classes`, mapping [0, 1] to [0, 1], with the size attributes of `core.restore`.

    Raises `NetworkError`.
    """
    network = construct(_class(spec.type), spec)
    if spec.type == "MixDehazeNet":
        network.register_forward_pre_hook(_to_signed)
        network.register_forward_hook(_from_signed)
    elif spec.type in ("FBCNN", "MPRNet"):
        network.register_forward_hook(_first)
    try:
        sizes = load_registry().load(network.state_dict()).size_requirements
    except Exception:
        return network  # by its arguments not the image restorer that spandrel knows; probing it decides
    # Plain attributes are copied with a module and are no part of its state dict.
    attributes: Any = network
    attributes.size_multiple_px = math.lcm(PAD_MULTIPLE_PX, sizes.multiple_of)
    attributes.size_min_px, attributes.size_square = sizes.minimum, sizes.square
    return network


def recognise(params: Mapping[str, Tensor]) -> tuple[NetworkSpec, dict[str, Tensor]]:
    """Which network a state dict belongs to, and its tensors under the names that this network has.

    Raises `NetworkError` for what spandrel does not know, and for anything but RGB to RGB at the same size.
    """
    from spandrel import ImageModelDescriptor, UnsupportedModelError

    try:
        found = load_registry().load(dict(params))
    except UnsupportedModelError:
        raise NetworkError(f"neither CORUN nor an architecture that spandrel recognises; {OWN_CLASS}") from None
    except Exception as error:
        raise NetworkError(f"spandrel recognises it but cannot load it ({format_error(error)}); {OWN_CLASS}") from None
    channels = found.input_channels, found.output_channels
    if not isinstance(found, ImageModelDescriptor) or found.scale != 1 or channels != (3, 3):
        what = f"{channels[0]} to {channels[1]} channels at scale {found.scale}"
        raise NetworkError(f"{found.architecture.name} of {what}; 3 to 3 channels at scale 1 are needed")
    network: Any = found.model
    name = next(name for name, network_class in list_classes().items() if network_class is type(network))
    args = {name: value for name, value in network.hyperparameters.items() if _is_plain(value)}
    return NetworkSpec(name, args), network.state_dict()


@functools.cache
def load_registry() -> Any:
    """spandrel's architectures, with those of `spandrel_extra_arches` where it is installed."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # their use of torch.jit
        from spandrel import MAIN_REGISTRY

        found = MAIN_REGISTRY.copy()
        if _has_extra():
            found.add(*importlib.import_module(EXTRA_PACKAGE).EXTRA_REGISTRY, ignore_duplicates=True)
    return found


@functools.cache
def list_classes() -> dict[str, type[nn.Module]]:
    """The network classes that the architectures export, by name; most bear the architecture's own name."""
    modules = [importlib.import_module(type(entry.architecture).__module__) for entry in load_registry()]
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {name: value for name, value in found.items() if isinstance(value, type) and issubclass(value, nn.Module)}


def is_extra(name: str) -> bool:
    """Whether a class of `list_classes` comes from `spandrel_extra_arches`."""
    return list_classes()[name].__module__.startswith(EXTRA_PACKAGE)


def _class(name: str) -> type[nn.Module]:
    if name in list_classes():
        return list_classes()[name]
    close = difflib.get_close_matches(name, list_classes(), 1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    extra = "" if _has_extra() else f"; {EXTRA_PACKAGE}, which has more, is not installed"
    raise NetworkError(
        f"{name} is no network of spandrel{hint}; corun_ray.core.networks.build.list_architectures() lists them{extra}"
    )


def _has_extra() -> bool:
    return importlib.util.find_spec(EXTRA_PACKAGE) is not None


def _is_plain(value: object) -> bool:
    """Whether an argument can be kept; the others (layer classes) are defaults that no checkpoint changes."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


# MixDehazeNet's published weights take and give [-1, 1]: its loader and test script scale both. Hooks, for a wrapper
# would change the names in the state dict.


def _to_signed(network: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] * 2 - 1,)


def _from_signed(network: nn.Module, inputs: tuple[Tensor], scene: Tensor) -> Tensor:
    return scene * 0.5 + 0.5


def _first(network: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> Tensor:
    """FBCNN returns a quality factor after the image, MPRNet its earlier stages after the last."""
    return output[0]
