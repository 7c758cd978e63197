"""Fills a weights folder from the internet, by the downloaders of the libraries that the weights belong to."""

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from corun_ray.core.metrics.catalog import list_no_reference_metrics
from corun_ray.core.scoring import quality as iqa
from corun_ray.core.scoring.daclip import DACLIP_FILE
from corun_ray.core.weights import WeightsError
from corun_ray.service.weights.folder import INDEX, Content, compute_content, read_index, write_index

PUBLISHED = ("daclip", "musiq", "vgg19")
"""What the published recipe needs."""
DACLIP_HUB = "weblzw/daclip-uir-ViT-B-32-irsde"

Progress = Callable[[str], None]


class _Wanted(WeightsError):
    """Ends the building of a metric at a file that must be fetched first."""


def fetch(folder: Path, what: Sequence[str], progress: Progress = print) -> None:
    """Fetches the files of `vgg19`, `daclip` and no-reference metrics of pyiqa into `folder`, each indexed as it comes.

    Files that are there as the index says are kept. `progress` gets one line a file. Raises `WeightsError` for a name
    that is none of these, for a host that cannot be reached and for a file that is not what it should be.
    """
    if unknown := sorted({*what} - {"vgg19", "daclip", *list_no_reference_metrics()}):
        raise WeightsError(f"{', '.join(unknown)}: expected vgg19, daclip or a no-reference metric of pyiqa")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"cannot make {folder}: {error.strerror}") from None
    for name in what:
        if name == "vgg19":
            _fetch_file(_vgg19_url(), folder, progress)
        elif name == "daclip":
            _fetch_file(_daclip_url(), folder, progress)
        else:
            _fetch_metric(name, folder, progress)


def _fetch_metric(name: str, folder: Path, progress: Progress) -> None:
    """Builds a metric, which tells what it needs, again and again until it has it all."""
    fetched: set[str] = set()

    def find(url: str) -> Path:
        if url not in fetched:
            raise _Wanted(url)
        return folder / iqa.get_file_name(url)

    while True:
        try:
            iqa.build_metric(name, find)
            return
        except _Wanted as wanted:
            # While a metric is built the downloaders are replaced: only now can they be used.
            url = str(wanted)
        _fetch_file(url, folder, progress)
        fetched.add(url)


def _fetch_file(url: str, folder: Path, progress: Progress) -> None:
    """Puts a file into the folder and its index, unless it is there as the index says."""
    contents = read_index(str(folder)) if (folder / INDEX).exists() else {}
    name = iqa.get_file_name(url)
    path = folder / name
    if path.is_file() and contents.get(name) == compute_content(path):
        progress(f"{name}  {_megabytes(contents[name])}  already there")
        return
    began_s = time.monotonic()
    # Beside the target, so that the last step is a rename; a broken download leaves nothing.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        _download(url, Path(scratch)).replace(path)
    contents[name] = compute_content(path)
    write_index(str(folder), contents)
    progress(f"{name}  {_megabytes(contents[name])}  {time.monotonic() - began_s:.1f} s")


def _download(url: str, scratch: Path) -> Path:
    """The file in the empty folder `scratch`, checked against the SHA-256 that its publisher gives, if any."""
    try:
        if hub := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", urlparse(url).path):
            return _from_hub(hub[1], unquote(hub[2]), scratch)
        # OpenAI's URLs hold the whole digest, torchvision's file names its first digits.
        whole, start = re.search(r"/([0-9a-f]{64})/", url), re.search(r"-([0-9a-f]{8,})\.\w+$", url)
        digest = whole or start
        path = scratch / iqa.get_file_name(url)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=sys.stderr.isatty())
        return _as_state_dict(path) if whole else path
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"{iqa.get_file_name(url)}: cannot be had from {urlparse(url).netloc} ({reason})") from None


def _from_hub(repository: str, name: str, scratch: Path) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    expected = get_hf_file_metadata(hf_hub_url(repository, name)).etag or ""
    path = Path(hf_hub_download(repository, name, local_dir=scratch))
    # The hub's tag of a large file is its SHA-256, which the client does not check; that of a small one is not.
    if re.fullmatch("[0-9a-f]{64}", expected):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise WeightsError(f"expected SHA-256 {expected}, got {found}")
    return path


def _as_state_dict(archive: Path) -> Path:
    """OpenAI's CLIP archives hold code; jobs load data only, so the tensors are taken out, once and here alone."""
    tensors = dict(torch.jit.load(str(archive), map_location="cpu").state_dict())
    torch.save(tensors, archive)
    return archive


def _megabytes(content: Content) -> str:
    return f"{content.size_bytes / 1e6:.1f} MB"


def _vgg19_url() -> str:
    from torchvision.models import VGG19_Weights

    return VGG19_Weights.IMAGENET1K_V1.url


def _daclip_url() -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(DACLIP_HUB, DACLIP_FILE)
