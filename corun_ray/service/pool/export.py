"""Export labels of a saved pool as picture files: one label beside its hazy image, or all labels in a folder."""

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
from corun_ray.core.training.labels import Label, Scores, decode, encode
from corun_ray.service.data.packs import INDEX, open_pack
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.index import is_rejected
from corun_ray.service.pool.source import SavedPool
from corun_ray.service.storage import Location, StorageError, locate

CELL_PX = 192
"""Side of a cell of `pool show`, unless the label itself is larger."""
TRANSMISSION_SUFFIX = ".transmission"
TRUST_SUFFIX = ".trust"
LIST_FILE = "labels.csv"
COLUMNS = ("key", "file", "clarity", "quality", "step", "height_px", "width_px")
NO_REJECTIONS: Mapping[str, Scores] = {}
_DRIVE = re.compile(r"[A-Za-z]:")


# --- One label ---


def compute_trust_map(label: Label, combine: Combine) -> NDArray[np.float32]:
    """Compute the trust in each region of a label.

    The map is H W in [0, 1], of the label's size.
    """
    # Stored labels are read-only arrays, and torch warns about those: copy the small maps of blocks.
    clarity = torch.from_numpy(label.block_clarity.copy())[None]
    quality = torch.from_numpy(label.block_quality.copy())[None]

    trust = Coherence(combine=combine).build_trust_map(BlockScores(clarity, quality), *label.scene.shape[-2:])
    return trust[0, 0].numpy()


def load_hazy_image(root: str, key: str, height_px: int, width_px: int) -> ImageU8:
    """Load the hazy image of a label.

    It is resized as the teacher's weak view is. `root` is a folder of images or a pack.

    Raises `StorageError`.
    """
    # A key comes from a file: it must not lead out of the folder.
    reason = explain_unsafe_key(key)
    if reason:
        raise StorageError(f"not read from {root}: its key {reason}")

    folder = locate(root)
    place = folder.child(key)
    try:
        content = _read_from_pack(folder, key) if folder.child(INDEX).exists() else place.read()
        return resize(decode_image(content), height_px, width_px)
    except BadImage as error:
        raise StorageError(f"{place.uri}: {error}") from None


def _read_from_pack(folder: Location, key: str) -> bytes:
    pack = open_pack(folder, folder.list_infos())
    if key not in pack.images:
        raise StorageError(f"the pack in {folder.uri} holds none")
    return pack.read(pack.images[key])


def draw_label(label: Label, hazy: ImageU8, combine: Combine) -> bytes:
    """Draw a label beside its hazy image, as PNG.

    One row: hazy image, label, transmission (empty where there is none) and trust map.
    """
    transmission = None
    if label.transmission is not None:
        transmission = apply_colour_map(decode(label.transmission)[0])

    row = {
        "hazy": hazy,
        "label": decode_scene(label),
        "transmission": transmission,
        "trust map": apply_colour_map(compute_trust_map(label, combine)),
    }
    return encode_png(draw_grid([row], max(CELL_PX, *label.scene.shape[-2:])))


def decode_scene(label: Label) -> ImageU8:
    """Return the scene of a label as H W RGB.

    8 bits, whatever the label's encoding.
    """
    return encode(decode(label.scene), "uint8").transpose(1, 2, 0)


def _encode_grey_png(unit: NDArray[np.floating]) -> bytes:
    """Encode H W in [0, 1] as a grey PNG.

    8 bits; 255 is 1.
    """
    return cv2.imencode(".png", encode(unit, "uint8"))[1].tobytes()


# --- Names of files ---


@dataclass
class Export:
    """The file of each exported key, relative to the export's folder, and why the other keys have none."""

    files: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    rejected: int = 0
    """Number of labels that were left out since a person has rejected them."""


def explain_unsafe_key(key: str) -> str | None:
    """Explain why a key cannot be a path below a folder.

    The rules are those of all systems together. Returns None for a safe key.
    """
    parts = key.split("/")
    if any(not c.isprintable() for c in key):
        return "has control characters"
    if "\\" in key:
        return "has a backslash"
    if key.startswith("/") or _DRIVE.match(key):
        return "is an absolute path"
    if ".." in parts:
        return "leads out of its folder (..)"
    if "" in parts or "." in parts:
        return "is no plain path (an empty part, or .)"
    return None


def plan_files(keys: Iterable[str], suffixes: Sequence[str] = ("",)) -> Export:
    """Plan a file for each key.

    The file has the key's name, with `.png` in place of its own ending. A key needs one file for each of `suffixes`
    (`.trust`), which stand before `.png`. If several keys need the same file, the first in sorted order gets it and the
    others are refused.
    """
    planned = Export()
    owners: dict[str, str] = {}
    for key in sorted(keys):
        file = f"{posixpath.splitext(key)[0]}.png"
        names = [add_suffix(file, suffix) for suffix in suffixes]

        # Refuse a key that leads out of the folder, or that shares a file with an earlier key.
        reason = explain_unsafe_key(key)
        for name in names:
            if reason is None and name in owners:
                reason = f"would have the same file as {owners[name]}"

        if reason:
            planned.refused[key] = reason
        else:
            planned.files[key] = file
            for name in names:
                owners[name] = key
    return planned


def add_suffix(file: str, suffix: str) -> str:
    """Add a suffix before `.png`: `a/b.png` and `.trust` give `a/b.trust.png`."""
    return f"{file.removesuffix('.png')}{suffix}.png"


# --- All labels ---


def export_labels(
    source: SavedPool,
    root: Path,
    with_transmission: bool = False,
    combine: Combine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rejections: Mapping[str, Scores] = NO_REJECTIONS,
) -> Export:
    """Write every label below `root`, and a list of them.

    `root` must be empty or new. The list is `LIST_FILE`. Labels of `rejections` are left out. Trust maps are written
    where `combine` is given, transmissions of the labels that have one. Nothing is overwritten, and nothing is written
    outside of `root`.

    Raises `StorageError`.
    """
    suffixes = [""]
    if with_transmission:
        suffixes.append(TRANSMISSION_SUFFIX)
    if combine:
        suffixes.append(TRUST_SUFFIX)

    try:
        # Fill a new folder alone, so that no file of the user's is touched.
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise StorageError(f"{root}: not empty; export fills a new folder")

        # Plan all names before the first file: keys that need the same file are known from the index.
        index = source.read_index()
        chosen = [key for key, (head, _) in index.items() if not is_rejected(head, rejections)]
        done = plan_files(chosen, suffixes)
        done.rejected = len(index) - len(chosen)

        # Write label by label; the list names those that were written.
        with (root / LIST_FILE).open("x", encoding="utf-8", newline="") as file:
            listing = csv.writer(file)
            listing.writerow(COLUMNS)
            for number, label in enumerate(snapshots.read_labels(source.pool, source.snapshot), 1):
                if label.key not in index:
                    raise StorageError(f"{source.uri}: one of its segments has other labels than its index names")
                _export_label(label, root, suffixes, combine, done)
                if label.key in done.files:
                    row = [label.key, done.files[label.key], *label.scores, label.step, *label.scene.shape[1:]]
                    listing.writerow(row)
                progress(number, len(index))
    except OSError as error:
        raise StorageError(f"cannot write {error.filename or root}: {error.strerror or error}") from None
    return done


def _export_label(label: Label, root: Path, suffixes: Sequence[str], combine: Combine | None, done: Export) -> None:
    """Write the files of one label.

    A label that cannot be written moves from `files` to `refused`.
    """
    file = done.files.get(label.key)
    if file is None:
        return

    contents = {file: encode_png(decode_scene(label))}
    if TRANSMISSION_SUFFIX in suffixes and label.transmission is not None:
        contents[add_suffix(file, TRANSMISSION_SUFFIX)] = _encode_grey_png(decode(label.transmission)[0])
    if combine:
        contents[add_suffix(file, TRUST_SUFFIX)] = _encode_grey_png(compute_trust_map(label, combine))

    reason = write_below(root, contents)
    if reason:
        done.refused[label.key] = reason
        del done.files[label.key]


def write_below(root: Path, contents: Mapping[str, bytes]) -> str | None:
    """Write files of one folder below `root`, all or none.

    `contents` are by relative path. Returns why none can be written, or None. An existing file, and a path that a link
    leads out of `root`, are left alone.

    Raises `OSError` for faults of the disk.
    """
    # Write the longest name first: if a name is too long, nothing has been written yet.
    paths = sorted((root / name for name in contents), key=lambda path: -len(path.name))

    # Follow links before anything is made.
    folder = paths[0].parent
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        return "leads out of the folder through a link"

    # Check all paths before the first is written: either all files of a label appear or none.
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
