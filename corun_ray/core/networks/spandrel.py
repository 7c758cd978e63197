"""The architectures of the spandrel package: building them by name, and recognising them from a state dict.

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
OWN_CLASS_HINT = "a network of your own needs its type (module.path:ClassName) and args"

NAME_SIMILARITY = 0.5
"""The least similarity, from 0 to 1, of a class name that an error suggests."""


def build_spandrel_network(spec: NetworkSpec) -> nn.Module:
    """Build a network of one of the classes that `list_classes` names.

    The network maps [0, 1] to [0, 1], and has the size attributes that `compute_padded_size` reads. Raises
    `NetworkError`.
    """
    network = construct(_find_class(spec.type), spec)

    # Adapt the value range and the outputs. These are hooks, since a wrapper would change the state dict's names.
    if spec.type == "MixDehazeNet":
        network.register_forward_pre_hook(_to_signed)
        network.register_forward_hook(_from_signed)
    elif spec.type in ("FBCNN", "MPRNet"):
        network.register_forward_hook(_keep_first_output)

    # spandrel knows which image sizes a network takes, if its arguments make it a restorer that spandrel recognises.
    # Where they do not, `probe_network` decides.
    try:
        sizes = load_registry().load(network.state_dict()).size_requirements
    except Exception:
        return network

    # Plain attributes are copied with a module, and are no part of its state dict.
    attributes: Any = network
    attributes.size_multiple_px = math.lcm(PAD_MULTIPLE_PX, sizes.multiple_of)
    attributes.size_min_px = sizes.minimum
    attributes.size_square = sizes.square
    return network


def recognise(params: Mapping[str, Tensor]) -> tuple[NetworkSpec, dict[str, Tensor]]:
    """Find the network to which a state dict belongs.

    Returns the network's description, and the tensors under the names that this network gives them. Raises
    `NetworkError` for a network that spandrel does not know, or that does not map RGB to RGB at the same size.
    """
    from spandrel import ImageModelDescriptor, UnsupportedModelError

    # Let spandrel find the architecture, and its arguments, from names and shapes.
    try:
        found = load_registry().load(dict(params))
    except UnsupportedModelError:
        raise NetworkError(f"neither CORUN nor an architecture that spandrel recognises; {OWN_CLASS_HINT}") from None
    except Exception as error:
        reason = format_error(error)
        raise NetworkError(f"spandrel recognises it but cannot load it ({reason}); {OWN_CLASS_HINT}") from None

    # Accept restoration alone: no greyscale, no super-resolution.
    channels = found.input_channels, found.output_channels
    if not isinstance(found, ImageModelDescriptor) or found.scale != 1 or channels != (3, 3):
        what = f"{channels[0]} to {channels[1]} channels at scale {found.scale}"
        raise NetworkError(f"{found.architecture.name} of {what}; 3 to 3 channels at scale 1 are needed")

    # Describe the network. Arguments that are no plain values (layer classes) are defaults that no checkpoint changes.
    network: Any = found.model
    name = next(name for name, network_class in list_classes().items() if network_class is type(network))
    args = {}
    for argument, value in network.hyperparameters.items():
        if _is_plain(value):
            args[argument] = value
    return NetworkSpec(name, args), network.state_dict()


@functools.cache
def load_registry() -> Any:
    """Load spandrel's architectures, with the extra ones where they are installed."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # their use of torch.jit
        from spandrel import MAIN_REGISTRY

        registry = MAIN_REGISTRY.copy()
        if _has_extra():
            registry.add(*importlib.import_module(EXTRA_PACKAGE).EXTRA_REGISTRY, ignore_duplicates=True)
    return registry


@functools.cache
def list_classes() -> dict[str, type[nn.Module]]:
    """List the network classes that the architectures export, by name.

    Most classes bear the name of their architecture.
    """
    classes = {}
    for entry in load_registry():
        module = importlib.import_module(type(entry.architecture).__module__)
        for name in module.__all__:
            exported = getattr(module, name)
            if isinstance(exported, type) and issubclass(exported, nn.Module):
                classes[name] = exported
    return classes


def is_extra(name: str) -> bool:
    """Tell whether a class comes from `spandrel_extra_arches`."""
    return list_classes()[name].__module__.startswith(EXTRA_PACKAGE)


def _find_class(name: str) -> type[nn.Module]:
    """Find a network class by name.

    Raises `NetworkError` with a suggestion where there is none.
    """
    classes = list_classes()
    if name in classes:
        return classes[name]

    close = difflib.get_close_matches(name, classes, 1, cutoff=NAME_SIMILARITY)
    suggestion = f" (did you mean {close[0]}?)" if close else ""
    extra = "" if _has_extra() else f"; {EXTRA_PACKAGE}, which has more, is not installed"
    raise NetworkError(
        f"{name} is no network of spandrel{suggestion}; "
        f"corun_ray.core.networks.build.list_architectures() lists them{extra}"
    )


def _has_extra() -> bool:
    """Tell whether `spandrel_extra_arches` is installed."""
    return importlib.util.find_spec(EXTRA_PACKAGE) is not None


def _is_plain(value: object) -> bool:
    """Tell whether an argument can be stored as JSON."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _to_signed(network: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Map the input from [0, 1] to [-1, 1].

    The published weights of MixDehazeNet take and return [-1, 1]: its loader and test script scale both.
    """
    return (inputs[0] * 2 - 1,)


def _from_signed(network: nn.Module, inputs: tuple[Tensor], scene: Tensor) -> Tensor:
    """Map the output from [-1, 1] to [0, 1]."""
    return scene * 0.5 + 0.5


def _keep_first_output(network: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> Tensor:
    """Return the image alone.

    FBCNN returns a quality factor after the image, MPRNet the images of its earlier stages after the last one's.
    """
    return output[0]
