"""Make hazy scenes with known truth, and better and worse restorations of them.

`weight_free_scorers.py` uses them. Images are `H W 3` float32 RGB in [0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from corun_ray.core.data.depth import draw_procedural_depth
from corun_ray.core.data.haze import Haze, add_haze, compute_transmission
from corun_ray.core.data.images import decode_image
from corun_ray.core.networks.corun import update_scene, update_transmission

Image = NDArray[np.floating]
SIZES_PX = (64, 96, 288)


@dataclass(frozen=True)
class Scene:
    """A clear image, its hazy image, and the haze between them."""

    size_px: int
    truth: Image
    hazy: Image
    transmission: Image
    """`H W 1`."""
    airlight: Image
    """`3`."""


def read(path: Path) -> Image:
    """Read an image."""
    return (decode_image(path.read_bytes()) / 255).astype(np.float32)


def shrink(image: Image, size_px: int) -> Image:
    """Resize an image to a square."""
    return np.asarray(cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA), np.float32)


def synthetic_scene(clear: Image, size_px: int, rng: np.random.Generator) -> Scene:
    """Add haze to a clear photograph.

    At 288 px the photograph is cropped, at other sizes resized. Half of the hazy images get noise, half JPEG.
    """
    if size_px == 288:
        top, left = (rng.integers(0, side - size_px + 1) for side in clear.shape[:2])
        truth = clear[top : top + size_px, left : left + size_px]
    else:
        truth = shrink(clear, size_px)

    # Haze of random density and colour over procedural depth.
    haze = Haze(rng.uniform(0.3, 1.6), tuple(np.clip(rng.uniform(0.6, 1) + rng.uniform(-0.025, 0.025, 3), 0, 1)))
    depth_map = draw_procedural_depth(rng, size_px, size_px)
    light = compute_transmission(depth_map.to_inverse(depth_map.pixels), haze.beta)
    hazy = add_haze(truth, light, haze)

    # The faults of a camera.
    if rng.random() < 0.5:
        hazy = quantise(hazy + rng.normal(0, rng.integers(2, 8) / 255, hazy.shape))
    if rng.random() < 0.5:
        hazy = jpeg(hazy, int(rng.integers(50, 96)))
    return Scene(size_px, truth, quantise(hazy), light[..., None], np.array(haze.airlight, np.float32))


def paired_scene(clear: Image, hazy: Image, size_px: int) -> Scene:
    """Make a scene of a hazy/clear pair."""
    truth, hazy = shrink(clear, size_px), shrink(hazy, size_px)

    # The transmission is the local least-squares fit of `hazy - A` to `clear - A`.
    airlight = estimate_airlight(hazy, 7)
    scattered, emitted = hazy - airlight, truth - airlight
    fit = (box((scattered * emitted).sum(-1), 3) + 1e-3) / (box((emitted**2).sum(-1), 3) + 1e-3)
    return Scene(size_px, truth, hazy, fit.clip(0.05, 1)[..., None], airlight)


def scenes(clear: list[Path], pairs: list[tuple[Path, Path]], rng: np.random.Generator) -> Iterator[Scene]:
    """Yield the scenes of all photographs and pairs, at every size."""
    for path in clear:
        for size_px in SIZES_PX:
            yield synthetic_scene(read(path), size_px, rng)
    for hazy, truth in pairs:
        for size_px in SIZES_PX:
            yield paired_scene(read(truth), read(hazy), size_px)


def match_pairs(folders: list[Path] | None) -> list[tuple[Path, Path]]:
    """Return the pairs (hazy, clear) of files of the same stem."""
    if folders is None:
        return []
    hazy, clear = ({path.stem: path for path in folder.iterdir()} for folder in folders)
    return [(hazy[stem], clear[stem]) for stem in sorted(hazy.keys() & clear.keys())]


def restorations(scene: Scene, rng: np.random.Generator) -> dict[str, Image]:
    """Make the restorations of a scene, by name, with 8-bit values.

    The names are the same for every scene.
    """
    hazy, airlight = scene.hazy, scene.airlight
    found = {"hazy": hazy}

    # The scattering model, inverted by a power of the true transmission. Above 1, too much haze is removed.
    for power in (0.3, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0):
        found[f"inverted^{power}"] = (hazy - airlight) / np.maximum(scene.transmission**power, 0.05) + airlight

    # The scattering model, inverted by one transmission for all pixels.
    for constant in (0.5, 0.7, 0.9):
        found[f"constant {constant}"] = (hazy - airlight) / constant + airlight

    # Methods without training.
    for stages in (1, 2, 4):
        found[f"closed form x{stages}"] = closed_form(hazy, stages)
    for omega in (0.4, 0.6, 0.8, 0.95):
        found[f"dark channel prior {omega}"] = dark_channel_prior(hazy, omega, 15 if scene.size_px > 200 else 7)

    # Mixtures of hazy and clear with a low-frequency error and noise, like the output of a half-trained network.
    for share in (0.2, 0.4, 0.6, 0.8, 0.95):
        drift = (cv2.resize(rng.uniform(size=(3, 3, 3)), hazy.shape[1::-1], interpolation=cv2.INTER_CUBIC) - 0.5) * 0.2
        mixed = share * scene.truth + (1 - share) * hazy + drift * rng.uniform(0.3, 1)
        found[f"network {share}"] = mixed + rng.normal(0, 0.008, hazy.shape)

    # Three of them with damage.
    for name, strengths in (("network 0.8", (0.5, 1, 2)), ("inverted^0.8", (1,)), ("hazy", (1,))):
        for strength in strengths:
            spoilt = spoil(quantise(found[name]), strength, rng)
            found |= {f"{name} + {fault} x{strength}": image for fault, image in spoilt.items()}

    return {name: quantise(image) for name, image in found.items()}


def spoil(image: Image, strength: float, rng: np.random.Generator) -> dict[str, Image]:
    """Damage an image in eleven ways that a label pool should refuse.

    A strength of 1 is moderate.
    """
    height, width = image.shape[:2]
    mean, grey = image.mean(), image.mean(-1, keepdims=True)
    blurred = cv2.GaussianBlur(image, (0, 0), strength)
    row, column = np.mgrid[:height, :width]
    tiles = np.kron(rng.normal(0, 0.05, (height // 8, width // 8)), np.ones((8, 8)))[..., None]
    tint = rng.permutation([1, 0.5, -1])

    return {
        "noise": image + rng.normal(0, 0.04 * strength, image.shape),
        "blur": blurred,
        "JPEG": jpeg(image, int(20 / strength)),
        "cast": image * (1 + 0.1 * strength * tint),
        "darkening": image ** (1 + 0.5 * strength),
        "brightening": image ** (1 / (1 + 0.5 * strength)),
        "stretching": (image - mean) * (1 + 0.4 * strength) + mean,
        "saturation": grey + (image - grey) * (1 + 0.6 * strength),
        "checkerboard": image + 0.04 * strength * ((row + column) % 2 * 2 - 1)[..., None],
        "8 px tiles": image + strength * tiles,
        "sharpening": image + 1.5 * strength * (image - cv2.GaussianBlur(image, (0, 0), 1.5)),
    }


def closed_form(hazy: Image, stages: int) -> Image:
    """Restore an image by CORUN without its learned networks."""
    image = torch.from_numpy(hazy).permute(2, 0, 1)[None]
    scene, light, weight = image, torch.full_like(image[:, :1], 0.5), torch.tensor(0.3).sigmoid()
    for _ in range(stages):
        light = update_transmission(image, light, scene, weight)
        scene = update_scene(image, scene, light, weight)
    return scene[0].permute(1, 2, 0).numpy()


def dark_channel_prior(hazy: Image, omega: float, patch_px: int) -> Image:
    """Restore an image by the dark channel prior (He, Sun, Tang, CVPR 2009)."""
    airlight = estimate_airlight(hazy, patch_px)
    dark = cv2.erode((hazy / airlight).min(-1), np.ones((patch_px, patch_px)))

    # A guided filter smooths the rough transmission.
    guide, rough, radius = hazy.mean(-1), 1 - omega * dark, 2 * patch_px
    mean_guide, mean_rough = box(guide, radius), box(rough, radius)
    slope = (box(guide * rough, radius) - mean_guide * mean_rough) / (box(guide**2, radius) - mean_guide**2 + 1e-3)
    light = box(slope, radius) * guide + box(mean_rough - slope * mean_guide, radius)

    return (hazy - airlight) / light.clip(0.1, 1)[..., None] + airlight


def estimate_airlight(hazy: Image, patch_px: int) -> Image:
    """Estimate the airlight.

    It is the mean colour of the thousandth of the pixels with the brightest dark channel.
    """
    dark = cv2.erode(hazy.min(-1), np.ones((patch_px, patch_px))).ravel()
    return hazy.reshape(-1, 3)[dark.argsort()[-max(1, dark.size // 1000) :]].mean(0)


def box(values: Image, radius_px: int) -> Image:
    """Average values over a square window."""
    return np.asarray(cv2.blur(values, (2 * radius_px + 1, 2 * radius_px + 1)))


def jpeg(image: Image, quality: int) -> Image:
    """Compress an image as JPEG and decode it."""
    bgr = (image.clip(0, 1) * 255).round().astype(np.uint8)[..., ::-1]
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return (decode_image(encoded.tobytes()) / 255).astype(np.float32)


def quantise(image: NDArray) -> Image:
    """Round an image to 8-bit values."""
    return (image.clip(0, 1) * 255).round().astype(np.float32) / 255
