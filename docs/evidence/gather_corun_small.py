"""Gather the images that `jobs/corun_small.yaml` trains on, in one folder.

`PHOTOGRAPHS` has the folders `clear`, `depth`, `clear_more`, `depth_more` and `hazy_train` (real haze), and lists of
photographs to leave out: `shallow.txt` (little depth) and `hazy_already.txt`. Every fifth photograph of `clear_more`,
at most 20, every fourteenth of `hazy_train` and three to show are kept back to validate on. `SCENES` are folders of
`corun-ray demo`.

Writes `clear`, `depth`, `hazy`, `validation` (hazy, clear, transmission, real) and `kept_back`, the photographs of the
validation set as they are:

    corun-ray demo scenes --seed 11 --clear 100 --hazy 0 --rooms 120
    python docs/evidence/gather_corun_small.py PHOTOGRAPHS corun_small --scenes scenes
"""

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np

from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.haze import HazeRange, add_haze, compute_transmission, sample_haze
from corun_ray.core.data.images import decode_image

KEPT_BACK_EVERY, KEPT_BACK_MOST = 5, 20
REAL_KEPT_BACK_EVERY = 14
SHOWN = ("dvd_drive_000", "lion_000", "rabauke_city_000")
"""Hazy photographs under free licences, kept back for the pictures of the README."""
FOLDERS = (
    *("clear", "depth", "hazy", "kept_back"),
    *("validation/hazy", "validation/clear", "validation/transmission", "validation/real"),
)
VALIDATION_HAZE = HazeRange(beta=(0.3, 1.4), airlight=(0.7, 1.0), airlight_tint=0.02, nearest=(0.0, 0.2))
VALIDATION_SIDE_PX = 320


def main() -> None:
    """Copy the training set, and lay haze over the validation set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--scenes", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()

    # Photographs with depth to speak of.
    found = list_photographs(arguments.photographs)
    kept_back = [image for image in found if image[0].parent.name == "clear_more"]
    kept_back = kept_back[::KEPT_BACK_EVERY][:KEPT_BACK_MOST]

    # Training: the photographs that are not kept back, and the rendered scenes.
    training = [image for image in found if image not in kept_back]
    for folder in arguments.scenes:
        training += pair_with_depth(folder / "clear", folder / "depth")
    for name in FOLDERS:
        (arguments.output / name).mkdir(parents=True, exist_ok=True)
    for clear, depth in training:
        shutil.copy(clear, arguments.output / "clear" / clear.name)
        shutil.copy(depth, arguments.output / "depth" / depth.name)

    # Validation: each photograph once, with haze of its own.
    rng = np.random.default_rng(77)
    for clear, depth in kept_back:
        shutil.copy(clear, arguments.output / "kept_back" / clear.name)
        write_validation_image(clear, depth, arguments.output / "validation", rng)

    # Real haze.
    real = sorted(path for path in (arguments.photographs / "hazy_train").iterdir() if path.suffix != ".tsv")
    for index, path in enumerate(real):
        is_kept_back = index % REAL_KEPT_BACK_EVERY == 0 or path.stem in SHOWN
        folder = "validation/real" if is_kept_back else "hazy"
        shutil.copy(path, arguments.output / folder / path.name)
    print(f"{len(training)} clear and {len(real)} hazy images, of which some are kept back; {len(kept_back)} validate")


def list_photographs(root: Path) -> list[tuple[Path, Path]]:
    """List the photographs with depth, without those named in the lists."""
    left_out = set((root / "shallow.txt").read_text().split()) | set((root / "hazy_already.txt").read_text().split())
    found = pair_with_depth(root / "clear", root / "depth") + pair_with_depth(root / "clear_more", root / "depth_more")
    return [
        pair for pair in found if not {pair[0].stem, pair[0].name, f"{pair[0].parent.name}/{pair[0].name}"} & left_out
    ]


def pair_with_depth(clear: Path, depth: Path) -> list[tuple[Path, Path]]:
    """Pair images and depth maps of one stem."""
    depths = {path.stem: path for path in depth.iterdir()}
    return [(path, depths[path.stem]) for path in sorted(clear.iterdir()) if path.stem in depths]


def write_validation_image(clear: Path, depth: Path, folder: Path, rng: np.random.Generator) -> None:
    """Lay haze over a photograph, and write hazy image, truth and transmission as PNG."""
    # Shrink the photograph.
    image = decode_image(clear.read_bytes())
    scale = VALIDATION_SIDE_PX / max(image.shape[:2])
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)

    # Lay haze over it, by its depth.
    depth_map = DepthMap.from_pixels(cv2.imread(str(depth), cv2.IMREAD_UNCHANGED), "inverse")
    depth_map = depth_map.fit_to_image(*image.shape[:2])
    haze = sample_haze(rng, VALIDATION_HAZE)
    transmission = compute_transmission(depth_map.to_inverse(depth_map.pixels), haze.beta, haze.nearest)
    hazy = add_haze(image.astype(np.float32) / 255, transmission, haze)

    for name, pixels in (
        ("hazy", hazy[..., ::-1] * 255),
        ("clear", image[..., ::-1]),
        ("transmission", transmission * 255),
    ):
        cv2.imwrite(str(folder / name / f"{clear.stem}.png"), np.rint(pixels).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
