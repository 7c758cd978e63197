"""Fetching: fill a weights folder from the internet, by the downloaders of the libraries that the weights belong to."""

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from corun_ray.core.choices import DETECTOR_NAMES
from corun_ray.core.inference.depth import MODEL_FILES
from corun_ray.core.metrics.catalog import list_no_reference_metrics
from corun_ray.core.metrics.detector import get_detector_url
from corun_ray.core.metrics.pyiqa import build_metric, get_file_name
from corun_ray.core.scoring.daclip import DACLIP_FILE
from corun_ray.core.weights import WeightsError
from corun_ray.service.weights.folder import DEPTH_MODEL, INDEX, Content, compute_content, read_index, write_index

PUBLISHED = ("daclip", "musiq", "vgg19", "brisque", "nima")
"""What the published recipe needs."""
DEPTH_HUB = "depth-anything/Depth-Anything-V2-Small-hf"
DACLIP_HUB = "weblzw/daclip-uir-ViT-B-32-irsde"
MAX_REASON_LENGTH = 200
"""Characters of a downloader's error that a message repeats."""

Progress = Callable[[str], None]


def fetch(folder: Path, what: Sequence[str], progress: Progress = print) -> None:
    """Fetch the named weights into `folder`.

    Names are `vgg19`, `daclip`, `depth`, the no-reference metrics of pyiqa and the detectors of torchvision.

    Each file is added to the index as it arrives. Files that are there as the index says are kept. `progress` is
    called with one line for each file.

    Raises `WeightsError` for an unknown name, a host that cannot be reached, and a file with a wrong checksum.
    """
    # Refuse unknown names before anything is fetched.
    unknown = sorted(set(what) - {"vgg19", "daclip", "depth", *list_no_reference_metrics(), *DETECTOR_NAMES})
    if unknown:
        expected = "vgg19, daclip, depth, a no-reference metric of pyiqa or a detector of torchvision"
        raise WeightsError(f"{', '.join(unknown)}: expected {expected}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"cannot make {folder}: {error.strerror}") from None

    # One by one: what was fetched before a failure is kept.
    for name in what:
        if name == "vgg19":
            _fetch_file(_get_vgg19_url(), folder, progress)
        elif name == "daclip":
            _fetch_file(_get_hub_url(DACLIP_HUB, DACLIP_FILE), folder, progress)
        elif name == "depth":
            _fetch_depth_model(folder / DEPTH_MODEL, progress)
        elif name in DETECTOR_NAMES:
            _fetch_file(get_detector_url(name), folder, progress)
        else:
            _fetch_metric(name, folder, progress)


class _FileNeeded(WeightsError):
    """Stops the building of a metric at a file that must be fetched first; the message is its URL."""


def _fetch_metric(name: str, folder: Path, progress: Progress) -> None:
    """Fetch the files of a pyiqa metric.

    Only building the metric tells which files it needs, so it is built again and again until it has all of them.
    """
    fetched: set[str] = set()

    def find(url: str) -> Path:
        if url not in fetched:
            raise _FileNeeded(url)

        return folder / get_file_name(url)

    while True:
        try:
            build_metric(name, find)
            return
        except _FileNeeded as needed:
            url = str(needed)

        # Outside of `build_metric`, which replaces the libraries' downloaders while it runs.
        _fetch_file(url, folder, progress)
        fetched.add(url)


def _fetch_depth_model(folder: Path, progress: Progress) -> None:
    """Fetch the depth estimator into a folder of its own."""
    folder.mkdir(exist_ok=True)
    for name in MODEL_FILES:
        _fetch_file(_get_hub_url(DEPTH_HUB, name), folder, progress)


def _fetch_file(url: str, folder: Path, progress: Progress) -> None:
    """Fetch one file into the folder and its index.

    Nothing is done where the file is there as the index says.
    """
    contents = read_index(str(folder)) if (folder / INDEX).exists() else {}
    name = get_file_name(url)
    path = folder / name
    if path.is_file() and contents.get(name) == compute_content(path):
        progress(f"{name}  {_format_megabytes(contents[name])}  already there")
        return

    # Download beside the target, so that the last step is a rename; a broken download leaves nothing.
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        _download(url, Path(scratch)).replace(path)

    # Index the file as soon as it is there.
    contents[name] = compute_content(path)
    write_index(str(folder), contents)
    progress(f"{name}  {_format_megabytes(contents[name])}  {time.monotonic() - started_s:.1f} s")


def _download(url: str, scratch: Path) -> Path:
    """Download a file into the empty folder `scratch`.

    Where the publisher gives a SHA-256, the file is checked against it.
    """
    try:
        # Hugging Face's URLs name a repository.
        hub = re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", urlparse(url).path)
        if hub:
            return _download_from_hub(hub[1], unquote(hub[2]), scratch)

        # OpenAI's URLs hold the whole digest; torchvision's file names hold its first digits.
        whole_digest = re.search(r"/([0-9a-f]{64})/", url)
        digest = whole_digest or re.search(r"-([0-9a-f]{8,})\.\w+$", url)
        path = scratch / get_file_name(url)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=sys.stderr.isatty())
        return _convert_to_state_dict(path) if whole_digest else path
    except Exception as error:
        reason = " ".join(str(error).split())[:MAX_REASON_LENGTH] or type(error).__name__
        host = urlparse(url).netloc
        raise WeightsError(f"{get_file_name(url)}: cannot be had from {host} ({reason})") from None


def _download_from_hub(repository: str, name: str, scratch: Path) -> Path:
    """Download a file of a Hugging Face repository.

    Raises `WeightsError` for a wrong checksum.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    etag = get_hf_file_metadata(hf_hub_url(repository, name)).etag or ""
    path = Path(hf_hub_download(repository, name, local_dir=scratch))

    # The tag of a large file is its SHA-256, which the hub's client does not check. The tag of a small file is not.
    if re.fullmatch("[0-9a-f]{64}", etag):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()

        if found != etag:
            raise WeightsError(f"expected SHA-256 {etag}, got {found}")

    return path


def _convert_to_state_dict(archive: Path) -> Path:
    """Replace one of OpenAI's CLIP archives by its tensors.

    The archives hold code, and jobs load data only. The code is loaded once, here alone.
    """
    tensors = dict(torch.jit.load(str(archive), map_location="cpu").state_dict())
    torch.save(tensors, archive)
    return archive


def _format_megabytes(content: Content) -> str:
    """Return a file's size as text."""
    return f"{content.size_bytes / 1e6:.1f} MB"


def _get_vgg19_url() -> str:
    """Return torchvision's URL of VGG-19."""
    from torchvision.models import VGG19_Weights

    return VGG19_Weights.IMAGENET1K_V1.url


def _get_hub_url(repository: str, name: str) -> str:
    """Return Hugging Face's URL of a file."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repository, name)
