"""Building pyiqa's metrics from files on this machine, as data only.

pyiqa has no offline option. While a metric is built, it downloads missing files into a folder that all programs share,
by several routes, unpickles them, and fetches ImageNet weights of its backbone only to overwrite them. So during the
build, and never otherwise, these routes are replaced. The alternative, copies of the metrics, would have to follow
every change of pyiqa.
"""

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from corun_ray.core.errors import format_error
from corun_ray.core.weights import WeightsError

FindFile = Callable[[str], Path]
"""Address of a file on the internet → its path on this machine."""

# One build at a time: the replaced functions belong to the whole process.
_BUILDING = threading.Lock()


def build_metric(name: str, find: FindFile) -> nn.Module:
    """Build pyiqa's metric `name` on the CPU, frozen.

    `find` supplies every file that pyiqa would download.

    Raises `WeightsError` where pyiqa cannot build the metric or a part of it is left without numbers.
    """
    from pyiqa import create_metric

    # Remember the files, so that an error can name the last one.
    files: list[str] = []

    def find_and_note(url: str) -> Path:
        """Find a file and note its name."""
        files.append(get_file_name(url))
        return find(url)

    try:
        # pyiqa prints while it builds: drop that output.
        silence = contextlib.redirect_stdout(io.StringIO())
        with _BUILDING, keep_pyiqa_offline(find_and_note) as backbones, silence, torch.no_grad():
            metric = create_metric(name, device="cpu", check_input_range=False)
    except WeightsError:
        raise
    except Exception as error:
        last_file = f" with {files[-1]}" if files else ""
        raise WeightsError(f"{name}: pyiqa cannot build it{last_file} ({format_error(error)})") from None

    _check_numbers(name, metric, backbones)
    for module in _walk_networks(metric):
        module.eval().requires_grad_(False)
    return metric


def get_file_name(url: str) -> str:
    """Return the weights folder's name for a file at `url`."""
    return Path(urlparse(url).path).name


def _walk_networks(root: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and the modules in its lists.

    Modules in plain lists are hidden from `parameters`. pyiqa hides CLIP in such lists.
    """
    yield root
    for module in root.modules():
        for value in vars(module).values():
            if not isinstance(value, list | tuple):
                continue
            for item in value:
                if isinstance(item, nn.Module):
                    yield from _walk_networks(item)


def _check_numbers(name: str, metric: nn.Module, backbones: list[str]) -> None:
    """Check that no parameter or buffer holds NaN.

    NaN is left in backbones that no file has overwritten. Raises `WeightsError`.
    """
    owner = f" of the backbone {', '.join(backbones)}" if backbones else ""
    for network in _walk_networks(metric):
        for key, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.isnan().any():
                raise WeightsError(f"{name}: its files hold no values for {key}{owner}, or values that are NaN")


# --- Replaced functions ---


@contextlib.contextmanager
def keep_pyiqa_offline(find: FindFile) -> Iterator[list[str]]:
    """Let pyiqa read only files that `find` supplies.

    Files are read as data only. Backbones that timm would fill with its own weights are filled with NaN, which the
    metric's own file must then overwrite; yields a list that receives their class names. Replaces functions in the
    whole process.
    """
    # Imported before anything is replaced, so that no module keeps a replacement.
    with _stand_in_for_pkg_resources():
        import clip.clip as openai_clip
        import pyiqa.archs.afineclip_model as afine_clip
        import pyiqa.archs.clip_model as pyiqa_clip
        import pyiqa.utils.download_util as pyiqa_download
        import timm.models._builder as timm_builder

    backbones: list[str] = []

    def link(url: str, target: str, *_: Any, **__: Any) -> None:
        """Link the file on this machine instead of downloading it."""
        Path(target).symlink_to(find(url).resolve())

    def locate(url: str, *_: Any) -> str:
        """Return the path on this machine instead of downloading."""
        return str(find(url))

    def refuse(*_: Any, **__: Any) -> None:
        """Refuse TorchScript programs.

        The loaders of CLIP answer a RuntimeError by reading the file as a plain state dict.
        """
        raise RuntimeError("a TorchScript program is expected, which is not data only")

    def poison(model: nn.Module, *_: Any, **__: Any) -> None:
        """Fill a backbone with NaN instead of downloaded weights."""
        backbones.append(type(model).__name__)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for name, original, replacement in (
            ("download_url_to_file", torch.hub.download_url_to_file, link),
            ("get_dir", torch.hub.get_dir, lambda: folder),
            ("DEFAULT_CACHE_DIR", pyiqa_download.DEFAULT_CACHE_DIR, folder),
            ("_download", openai_clip._download, locate),
            ("_download", pyiqa_clip._download, locate),
            ("_download", afine_clip._download, locate),
            ("load", torch.jit.load, refuse),
            ("load_pretrained", timm_builder.load_pretrained, poison),
        ):
            stack.enter_context(_replace(name, original, replacement))

        # These overrule the `weights_only=False` that pyiqa passes to torch.load.
        stack.enter_context(_set_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="0"))
        yield backbones


@contextlib.contextmanager
def _replace(name: str, original: Any, replacement: Any) -> Iterator[None]:
    """Replace a value in all modules, then restore it.

    In every module that has it under this name. Modules imported meanwhile get the original back too: pyiqa imports
    each metric's own when it is built.
    """
    _replace_everywhere(name, original, replacement)
    try:
        yield
    finally:
        _replace_everywhere(name, replacement, original)


def _replace_everywhere(name: str, old: Any, new: Any) -> None:
    """Replace `old` by `new` in every loaded module.

    Only where it has this name.
    """
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


@contextlib.contextmanager
def _set_environment(**values: str) -> Iterator[None]:
    """Set environment variables, then restore them."""
    # Not `mock.patch.dict`, which empties the environment for a moment, while other threads may read it.
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stand_in_for_pkg_resources() -> Iterator[None]:
    """Supply a `pkg_resources` where setuptools has none.

    It holds just `packaging`, which is all that openai-clip wants. setuptools 82 dropped the package.
    """
    if importlib.util.find_spec("pkg_resources"):
        yield
        return

    import packaging.version

    module: Any = ModuleType("pkg_resources")
    module.packaging = packaging
    sys.modules["pkg_resources"] = module
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
