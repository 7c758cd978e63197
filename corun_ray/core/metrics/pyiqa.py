"""Building pyiqa's metrics from files on this machine, as data only.

pyiqa has no offline option: while a metric is built it downloads what it lacks into a folder that all programs
share, by several routes, unpickles it, and fetches ImageNet weights of its backbone only to overwrite them. So
for that time, and never otherwise, those routes are replaced. Copying the metrics would be the other way, and
would have to follow every one of them.
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

from corun_ray.core.weights import WeightsError

FindFile = Callable[[str], Path]
"""Address of a file on the internet → where it lies on this machine."""


@contextlib.contextmanager
def keep_pyiqa_offline(find: FindFile) -> Iterator[list[str]]:
    """Lets pyiqa reach no file but those that `find` gives, and read them as data only.

    Backbones that timm would fill with weights of its own are filled with NaN, which the metric's own file must
    then overwrite; yields a list that receives their names. Replaces functions in the whole process.
    """
    with _pkg_resources():  # imported before anything is replaced, so that none of them keeps a replacement
        import clip.clip as openai_clip
        import pyiqa.archs.afineclip_model as afine_clip
        import pyiqa.archs.clip_model as pyiqa_clip
        import pyiqa.utils.download_util as pyiqa_download
        import timm.models._builder as timm_builder

    backbones: list[str] = []

    def link(url: str, target: str, *_: Any, **__: Any) -> None:
        Path(target).symlink_to(find(url).resolve())

    def locate(url: str, *_: Any) -> str:
        return str(find(url))

    def refuse(*_: Any, **__: Any) -> None:
        # The loaders of CLIP answer a RuntimeError by reading the file as a plain state dict.
        raise RuntimeError("a TorchScript program is expected, which is not data only")

    def poison(model: nn.Module, *_: Any, **__: Any) -> None:
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
            stack.enter_context(_replaced(name, original, replacement))
        # These overrule the `weights_only=False` that pyiqa passes.
        stack.enter_context(_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="0"))
        yield backbones


@contextlib.contextmanager
def _replaced(name: str, original: Any, replacement: Any) -> Iterator[None]:
    """Replaces a value in every module that has it under this name.

    Undone also in the modules that are imported meanwhile: pyiqa imports each metric's own when it is built.
    """
    _replace_everywhere(name, original, replacement)
    try:
        yield
    finally:
        _replace_everywhere(name, replacement, original)


def _replace_everywhere(name: str, old: Any, new: Any) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
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
def _pkg_resources() -> Iterator[None]:
    """Stands in for `pkg_resources`, of which openai-clip wants nothing but `packaging`; setuptools 82 dropped it."""
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


_BUILDING = threading.Lock()  # what is replaced belongs to the whole process


def build_metric(name: str, find: FindFile) -> nn.Module:
    """pyiqa's metric `name` on the CPU, frozen, with every file that it would download given by `find`.

    Raises `WeightsError`.
    """
    from pyiqa import create_metric

    files: list[str] = []

    def found(url: str) -> Path:
        files.append(get_file_name(url))
        return find(url)

    try:
        with (
            _BUILDING,
            keep_pyiqa_offline(found) as backbones,
            contextlib.redirect_stdout(io.StringIO()),
            torch.no_grad(),
        ):
            metric = create_metric(name, device="cpu", check_input_range=False)
    except WeightsError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        last = f" with {files[-1]}" if files else ""
        raise WeightsError(f"{name}: pyiqa cannot build it{last} ({reason})") from None
    _check_numbers(name, metric, backbones)
    for module in _networks(metric):
        module.eval().requires_grad_(False)
    return metric


def get_file_name(url: str) -> str:
    """The name under which a weights folder holds what pyiqa has at `url`."""
    return Path(urlparse(url).path).name


def _networks(root: nn.Module) -> Iterator[nn.Module]:
    """The module itself and those that it hides from its parameters in plain lists, as pyiqa does with CLIP."""
    yield root
    for module in root.modules():
        for value in vars(module).values():
            if isinstance(value, list | tuple):
                for item in value:
                    if isinstance(item, nn.Module):
                        yield from _networks(item)


def _check_numbers(name: str, metric: nn.Module, backbones: list[str]) -> None:
    for network in _networks(metric):
        for key, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.isnan().any():
                whose = f" of the backbone {', '.join(backbones)}" if backbones else ""
                raise WeightsError(f"{name}: its files hold no values for {key}{whose}, or values that are NaN")
