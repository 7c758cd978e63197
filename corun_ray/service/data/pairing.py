"""Pairing by name: which depth map or truth belongs to which image."""

import posixpath
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass

from corun_ray.config.pairing import KEY_GROUP

NAMED_FILES = 3
"""Images without a partner, or partners of one image, that a message names."""


def strip_suffix(path: str) -> str:
    """Return a path without its last suffix.

    That stem pairs an image with its depth or ground truth.
    """
    return posixpath.splitext(path)[0]


def get_stem(path: str) -> str:
    """Return a path without its last suffix, in Unicode's NFC.

    Files of one stem belong together. Some file systems store é as e and an accent.
    """
    return unicodedata.normalize("NFC", strip_suffix(path))


@dataclass(frozen=True)
class Pairing:
    """Images with their partners (depth maps, clean images), and the reasons for the files left over."""

    pairs: dict[str, str]
    """Image → partner. Several images may have one partner."""
    unpaired: dict[str, str]
    """Image → reason."""
    unused: dict[str, str]
    """Partner → reason."""
    ambiguous: tuple[str, ...] = ()
    """The images of `unpaired` that have several partners."""

    @property
    def num_images(self) -> int:
        """Number of images, with and without a partner."""
        return len(self.pairs) + len(self.unpaired)

    def list_skipped(self, image_root: str, partner_root: str) -> dict[str, str]:
        """Return the reasons of all files left over, by URI."""
        skipped = {posixpath.join(image_root, image): reason for image, reason in self.unpaired.items()}
        for partner, reason in self.unused.items():
            skipped[posixpath.join(partner_root, partner)] = reason
        return skipped


def pair_by_stem(images: list[str], partners: list[str], partner_name: str) -> Pairing:
    """Pair each image with the one partner of its stem.

    The stem is the path below the folder, without its suffix. `partner_name` ("depth map", "clear image") is for the
    reasons.
    """
    return pair_by_pattern(images, partners, partner_name, None, None)


def find_key(path: str, pattern: re.Pattern[str] | None) -> str | None:
    """Return the key of a file, which is equal for files that belong together.

    `path` is relative to the data root. Without a pattern, the key is the path without suffix. With one, it is the
    folder and the pattern's group, found in the name without suffix; a pattern that has a `/` in it sees folders and
    name, and its group alone is the key.

    Returns None where the pattern does not match, or its group is empty.
    """
    stem = get_stem(path)
    if pattern is None:
        return stem

    # Find the group that is the key.
    folder, name = posixpath.split(stem)
    sees_folders = "/" in pattern.pattern
    found = pattern.search(stem if sees_folders else name)
    group = found[KEY_GROUP if KEY_GROUP in pattern.groupindex else 1] if found else None
    if not group:
        return None

    return group if sees_folders else posixpath.join(folder, group)


def pair_by_pattern(
    images: list[str],
    partners: list[str],
    partner_name: str,
    pattern: re.Pattern[str] | None,
    partner_pattern: re.Pattern[str] | None,
) -> Pairing:
    """Pair each image with the one partner of its key."""
    # The partners of each key.
    by_key: dict[str | None, list[str]] = defaultdict(list)
    for partner in partners:
        by_key[find_key(partner, partner_pattern)].append(partner)
    without_key = by_key.pop(None, [])

    # Images with exactly one partner are pairs.
    pairs, unpaired, ambiguous = {}, {}, []
    for image in images:
        key = find_key(image, pattern)
        found = by_key.get(key, [])
        if len(found) == 1:
            pairs[image] = found[0]
        elif found:
            unpaired[image] = f"{len(found)} {partner_name}s match it: {_name_first(found)}"
            ambiguous.append(image)
        elif pattern is None:
            unpaired[image] = f"no {partner_name} of this name"
        else:
            unpaired[image] = "no match" if key is None else f"no {partner_name} of the key {key}"

    # Partners that match no image.
    matching = {find_key(image, pattern) for image in images}
    unused = dict.fromkeys(without_key, f"{partner_name} that has no match")
    for key, same in by_key.items():
        if key not in matching:
            unused |= dict.fromkeys(same, f"{partner_name} that matches no image")

    return Pairing(pairs, unpaired, unused, tuple(ambiguous))


def _name_first(files: list[str]) -> str:
    """Name the first files of a list."""
    more = len(files) - NAMED_FILES
    return ", ".join(files[:NAMED_FILES]) + (f" and {more} more" if more > 0 else "")
