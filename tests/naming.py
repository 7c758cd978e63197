"""Small copies of public data sets in their own names: hazy pictures and their truths, and the keys that read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.conftest import photograph, write_image

BORDER_PX = 5
"""Pixels that a truth with a border is wider and higher than what its hazy image shows."""


class NamedSet(NamedTuple):
    """A data set on disk."""

    keys: dict[str, Any]
    """Of a section with `hazy` and `clear`."""
    pairs: dict[str, str]
    """Hazy image → its truth, both below their folder."""


def write_pairs(hazy: Path, clear: Path, pairs: dict[str, str], border_px: int = 0) -> None:
    """Write hazy images and their truths; a truth is written once, however many images it has.

    Hazy pixels are half of their truth's, and 110.
    """
    rng = np.random.default_rng(3)
    truths = {name: photograph(rng, 52 + border_px, 64 + border_px) for name in dict.fromkeys(pairs.values())}
    first = border_px // 2
    for hazy_name, clear_name in pairs.items():
        write_image(clear / clear_name, truths[clear_name])
        view = truths[clear_name][first : first + 52, first : first + 64]
        write_image(hazy / hazy_name, (0.5 * view + 110).round().astype(np.uint8))


def make_its(root: Path) -> NamedSet:
    """RESIDE's indoor training set: several hazy images of one clear one, which has its number."""
    pairs = {f"{scene}_{haze}_{0.7 + haze / 10:.2f}.png": f"{scene}.png" for scene in (1, 10, 2) for haze in (1, 2)}
    write_pairs(root / "hazy", root / "clear", pairs)
    return NamedSet({"hazy": str(root / "hazy"), "clear": str(root / "clear"), "match": "^([^_]+)"}, pairs)


def make_ots(root: Path) -> NamedSet:
    """RESIDE's outdoor training set: airlight and scattering coefficient in the hazy name, in folders of parts."""
    pairs = {f"part{scene}/000{scene}_0.8_{beta}.jpg": f"000{scene}.jpg" for scene in (1, 2) for beta in (0.04, 0.2)}
    write_pairs(root / "haze", root / "clear", pairs)
    keys = {"hazy": str(root / "haze"), "clear": str(root / "clear"), "match": r"^(?:part\d/)?([^_/]+)"}
    return NamedSet(keys, pairs)


def make_nh_haze(root: Path) -> NamedSet:
    """NH-HAZE: hazy images and truths in one folder."""
    pairs = {f"{scene:02}_hazy.png": f"{scene:02}_GT.png" for scene in (1, 2, 33)}
    write_pairs(root, root, pairs)
    keys = {"hazy": str(root), "clear": str(root), "match": r"^(\d+)_hazy$", "match_clear": r"^(\d+)_GT$"}
    return NamedSet(keys, pairs)


def make_o_haze(root: Path) -> NamedSet:
    """O-HAZE: a folder of hazy images, and one of truths of other names."""
    pairs = {f"{scene:02}_outdoor_hazy.jpg": f"{scene:02}_outdoor_GT.jpg" for scene in (1, 2, 45)}
    write_pairs(root / "hazy", root / "GT", pairs)
    return NamedSet({"hazy": str(root / "hazy"), "clear": str(root / "GT"), "match": r"^(\d+)_"}, pairs)


def make_sots_indoor(root: Path) -> NamedSet:
    """RESIDE's indoor test set: the truths have a border that the hazy images have not."""
    pairs = {f"140{scene}_{haze}.png": f"140{scene}.png" for scene in (0, 1, 2) for haze in (1, 10)}
    write_pairs(root / "hazy", root / "gt", pairs, BORDER_PX)
    keys = {"hazy": str(root / "hazy"), "clear": str(root / "gt"), "match": "^([^_]+)", "crop_truth": True}
    return NamedSet(keys, pairs)


def make_sots_outdoor(root: Path) -> NamedSet:
    """RESIDE's outdoor test set: hazy JPEG files, truths in PNG."""
    pairs = {f"000{scene}_0.8_0.2.jpg": f"000{scene}.png" for scene in (1, 2, 3)}
    write_pairs(root / "hazy", root / "gt", pairs)
    return NamedSet({"hazy": str(root / "hazy"), "clear": str(root / "gt"), "match": "^([^_]+)"}, pairs)


MAKERS: dict[str, Callable[[Path], NamedSet]] = {
    "its": make_its,
    "ots": make_ots,
    "nh-haze": make_nh_haze,
    "o-haze": make_o_haze,
    "sots-indoor": make_sots_indoor,
    "sots-outdoor": make_sots_outdoor,
}
