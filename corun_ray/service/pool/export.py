"""Labels of a saved pool as picture files: one beside its hazy image, or all of them in a folder."""

import csv
import errno
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from corun_ray.core.choices import Combine
from corun_ray.core.data.augment import resize
from corun_ray.core.data.images import BadImage, ImageU8, decode_image, encode_png
from corun_ray.core.inference.pictures import apply_colour_map, draw_grid
from corun_ray.core.scoring.coherence import BlockScores, Coherence
from corun_ray.core.training.labels import Label, decode, encode
from corun_ray.service.data.packs import INDEX, open_pack
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.source import SavedPool
from corun_ray.service.storage import Location, StorageError, locate

CELL_PX = 192
"""Side of a picture of `pool show`, unless the label's own is larger."""
TRANSMISSION, TRUST = ".transmission", ".trust"
LIST_FILE = "labels.csv"
COLUMNS = ("key", "file", "clarity", "quality", "step", "height_px", "width_px")
_DRIVE = re.compile(r"[A-Za-z]:")


# --- One label ---


def trust_map(label: Label, combine: Combine) -> NDArray[np.float32]:
    """H W in [0, 1], of the label's size: how far its regions are trusted."""
    blocks = BlockScores(*(torch.from_numpy(x.copy())[None] for x in (label.block_clarity, label.block_quality)))
    trust = Coherence(combine=combine).build_trust_map(blocks, *label.scene.shape[-2:])
    return trust[0, 0].numpy()


def hazy_image(root: str, key: str, height_px: int, width_px: int) -> ImageU8:
    """The image that a label is of, resized to it as the teacher's weak view is; raises `StorageError`."""
    reason = why_unsafe(key)
    if reason:
        raise StorageError(f"not read from {root}: its key {reason}")
    folder = locate(root)
    place = folder.child(key)
    try:
        content = _in_pack(folder, key) if folder.child(INDEX).exists() else place.read()
        return resize(decode_image(content), height_px, width_px)
    except BadImage as error:
        raise StorageError(f"{place.uri}: {error}") from None


def _in_pack(folder: Location, key: str) -> bytes:
    pack = open_pack(folder, folder.list_infos())
    if key not in pack.images:
        raise StorageError(f"the pack in {folder.uri} holds none")
    return pack.read(pack.images[key])


def picture(label: Label, hazy: ImageU8, combine: Combine) -> bytes:
    """A PNG: hazy image, label, transmission (an empty cell where there is none) and trust map in one row."""
    row = {
        "hazy": hazy,
        "label": _scene(label),
        "transmission": None if label.transmission is None else apply_colour_map(decode(label.transmission)[0]),
        "trust map": apply_colour_map(trust_map(label, combine)),
    }
    return encode_png(draw_grid([row], max(CELL_PX, *label.scene.shape[-2:])))


def _scene(label: Label) -> ImageU8:
    return encode(decode(label.scene), "uint8").transpose(1, 2, 0)


def _grey_png(unit: NDArray[np.floating]) -> bytes:
    """H W in [0, 1] as a grey PNG of 8 bits, 255 is 1."""
    return cv2.imencode(".png", encode(unit, "uint8"))[1].tobytes()


# --- All labels ---


@dataclass
class Export:
    """Which file a key goes into, relative to the export's folder, and why other keys go into none."""

    files: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def why_unsafe(key: str) -> str | None:
    """Why a key cannot be a path below a folder on any system; None where it can."""
    if any(not c.isprintable() for c in key):
        return "has control characters"
    if "\\" in key:
        return "has a backslash"
    if key.startswith("/") or _DRIVE.match(key):
        return "is an absolute path"
    if ".." in key.split("/"):
        return "leads out of its folder (..)"
    if {"", "."} & set(key.split("/")):
        return "is no plain path (an empty part, or .)"
    return None


def plan(keys: Iterable[str], kinds: Sequence[str] = ("",)) -> Export:
    """A file for each key, its suffix replaced by `.png`; of keys with the same file the first has it.

    `kinds` go before the suffix (`.trust`): a key needs all of its files.
    """
    found, owners = Export(), dict[str, str]()
    for key in sorted(keys):
        file = f"{posixpath.splitext(key)[0]}.png"
        names = [beside(file, kind) for kind in kinds]
        owner = next((owners[name] for name in names if name in owners), None)
        reason = why_unsafe(key) or (owner and f"would have the same file as {owner}")
        if reason:
            found.refused[key] = reason
        else:
            found.files[key] = file
            owners |= dict.fromkeys(names, key)
    return found


def beside(file: str, kind: str) -> str:
    """`a/b.png` and `.trust` → `a/b.trust.png`."""
    return f"{file.removesuffix('.png')}{kind}.png"


def export(
    source: SavedPool,
    root: Path,
    with_transmission: bool = False,
    combine: Combine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Export:
    """Writes every label below `root`, which must be empty or not there, and `LIST_FILE` with `COLUMNS`.

    Trust maps only where `combine` is given; transmissions only of labels that have one. Nothing is overwritten or
    written outside. Raises `StorageError`.
    """
    kinds = ["", *([TRANSMISSION] if with_transmission else []), *([TRUST] if combine else [])]
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise StorageError(f"{root}: not empty; export fills a new folder")
        index = source.index()
        done = plan(index, kinds)
        with (root / LIST_FILE).open("x", encoding="utf-8", newline="") as file:
            listing = csv.writer(file)
            listing.writerow(COLUMNS)
            for number, label in enumerate(snapshots.read_labels(source.pool, source.snapshot), 1):
                if label.key not in index:
                    raise StorageError(f"{source.uri}: one of its segments has other labels than its index names")
                _export_label(label, root, kinds, combine, done)
                if label.key in done.files:
                    place = (label.key, done.files[label.key])
                    listing.writerow([*place, *label.scores, label.step, *label.scene.shape[1:]])
                progress(number, len(index))
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or root}: {error.strerror or error}") from None
    return done


def _export_label(label: Label, root: Path, kinds: Sequence[str], combine: Combine | None, done: Export) -> None:
    file = done.files.get(label.key)
    if file is None:
        return
    contents = {file: encode_png(_scene(label))}
    if TRANSMISSION in kinds and label.transmission is not None:
        contents[beside(file, TRANSMISSION)] = _grey_png(decode(label.transmission)[0])
    if combine:
        contents[beside(file, TRUST)] = _grey_png(trust_map(label, combine))
    reason = write_below(root, contents)
    if reason:
        done.refused[label.key] = reason
        del done.files[label.key]


def write_below(root: Path, contents: Mapping[str, bytes]) -> str | None:
    """Writes files of one folder at paths relative to `root`: all of them, or says why none can be.

    A path that is taken, or that a link leads out of `root`, is left alone. Raises `OSError` for a disk's faults.
    """
    # The longest first: where it is too long a name, nothing has been written.
    paths = sorted((root / name for name in contents), key=lambda path: -len(path.name))
    folder = paths[0].parent
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        return "leads out of the folder through a link"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(os.path.lexists(path) for path in paths):
            return "would have the same file as another label"
        for path in paths:
            with path.open("xb") as file:
                file.write(contents[path.relative_to(root).as_posix()])
    except (FileExistsError, NotADirectoryError):
        return "would lie in a folder that is a file"
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return "is too long a name"
        raise
    return None
