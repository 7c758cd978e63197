"""The demo dataset as files: clear images with depth, and hazy photographs with their truth."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.demo.film import (
    choose_exposure,
    compress_jpeg,
    develop,
    reduce_nearest_z,
    shrink_to_picture,
    take_photograph,
)
from corun_ray.demo.haze import Fog
from corun_ray.demo.landscapes import draw_alpine, draw_canyon, draw_lake
from corun_ray.demo.light import PALETTES, Palette
from corun_ray.demo.noise import Array, Noise
from corun_ray.demo.plants import Herbarium
from corun_ray.demo.roads import draw_road
from corun_ray.demo.rooms import draw_room
from corun_ray.demo.scene import Scene
from corun_ray.demo.towns import draw_skyline, draw_street

MANIFEST = "demo.json"
_FORMAT = 2
_CLEAR_JPEG_QUALITY = 95
_HAZY_JPEG_QUALITIES = (80, 95)
_FOLDERS = ("clear", "depth", "hazy", "hazy_truth", "hazy_transmission")
_SHARED_STREAM = 2
"""Random numbers of what all scenes share; each group has a stream of its own."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Kind:
    """A kind of scene: how it is drawn, and the ranges of its viewpoint."""

    draw: Callable[[Scene], None]
    eye_m: Range
    """Height of the eye."""
    horizon: Range
    """Row of the horizon, as a share of the height."""
    zoom: Range
    """Focal length in widths."""


KINDS = {
    "alpine": Kind(draw_alpine, (8, 14), (0.55, 0.68), (0.9, 1.3)),
    "street": Kind(draw_street, (2.5, 9), (0.42, 0.58), (0.75, 1.1)),
    "lake": Kind(draw_lake, (6, 11), (0.52, 0.62), (0.85, 1.2)),
    "skyline": Kind(draw_skyline, (9, 18), (0.54, 0.66), (0.85, 1.2)),
    "road": Kind(draw_road, (3, 6), (0.5, 0.6), (0.8, 1.1)),
    "canyon": Kind(draw_canyon, (8, 20), (0.5, 0.65), (0.85, 1.2)),
}
ROOM = Kind(draw_room, (1.2, 1.7), (0.42, 0.6), (0.6, 0.95))


@dataclass(frozen=True)
class _Group:
    """A group of images: its stream of random numbers, and the kinds and palettes that take turns in it."""

    stream: int
    kinds: dict[str, Kind]
    palettes: tuple[Palette, ...]


_GROUPS = {
    "clear": _Group(0, KINDS, PALETTES[:6]),
    "hazy": _Group(1, KINDS, PALETTES[1:]),
    "room": _Group(3, {"room": ROOM}, PALETTES[:1]),
}


@dataclass(frozen=True)
class DemoSize:
    """Number and size of the demo's images."""

    clear_images: int = 80
    hazy_images: int = 24
    width_px: int = 320
    height_px: int = 240
    room_images: int = 0
    """Clear images of rooms, in addition."""


_DEFAULT_SIZE = DemoSize()


def write_demo(
    root: Path,
    seed: int = 0,
    size: DemoSize = _DEFAULT_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the demo dataset, or its missing images, into `root`.

    - `clear/NAME.jpg`, `depth/NAME.png`: haze-free pictures, and their 16-bit inverse depth
      `65535 * near_m / z`: near is large, 65535 is the nearest point, 0 the sky. `z` is the distance along
      the optical axis, in metres, of the very geometry that was drawn; `near_m` stands in `demo.json`.
    - `hazy/NAME.png`, `hazy_truth/NAME.png`: other scenes, hazed by another law than the training synthesis
      and taken with a noisy camera; and the same scenes without haze and noise, to measure against.
    - `hazy_transmission/NAME.png`: the transmission of that haze, 16 bits, 65535 is clear air.
    - `demo.json`: seed, size, and kind, palette and haze of every image.

    The same seed and size give the same bytes. `progress(done, total)` is called for every image.

    Raises `FileExistsError` if `root` holds anything else, or a demo of another seed or size.
    """
    manifest = _load_manifest(root, seed, size)
    numbers = {"clear": size.clear_images, "hazy": size.hazy_images, "room": size.room_images}
    tasks = [(group, index) for group, number in numbers.items() for index in range(number)]
    missing = [(group, i) for group, i in tasks if _make_name(group, i) not in manifest["images"]]
    if not missing:
        return

    # All scenes share the noise and the trees, which depend on the seed alone.
    rng = np.random.default_rng([seed, _SHARED_STREAM])
    noise, herbarium = Noise(rng), Herbarium(rng)

    # The manifest comes first, so that a run stopped at any time is known as a demo.
    root.mkdir(parents=True, exist_ok=True)
    _write_manifest(root, manifest)
    for folder in _FOLDERS:
        (root / folder).mkdir(exist_ok=True)

    # An image enters the manifest once its files are written.
    for done, (group, index) in enumerate(missing, start=len(tasks) - len(missing) + 1):
        name = _make_name(group, index)
        scene, description = _draw(group, index, seed, size, noise, herbarium)
        write = _write_hazy if group == "hazy" else _write_clear
        manifest["images"][name] = description | write(root, name, scene)
        _write_manifest(root, manifest)
        if progress:
            progress(done, len(tasks))


def draw_scene(
    kind: Kind,
    palette: Palette,
    size_px: tuple[int, int],
    noise: Noise,
    herbarium: Herbarium,
    rng: np.random.Generator,
) -> Scene:
    """Draw a scene of one kind.

    `size_px` is the final (width, height); the scene is `OVERSAMPLING` times as large.
    """
    eye_m, horizon, zoom = (float(rng.uniform(*span)) for span in (kind.eye_m, kind.horizon, kind.zoom))
    scene = Scene.begin(size_px, palette, noise, herbarium, rng, eye_m, horizon, zoom)
    kind.draw(scene)
    return scene


# --- Manifest ---


def _load_manifest(root: Path, seed: int, size: DemoSize) -> dict[str, Any]:
    """Load the manifest in `root`, or begin one.

    Raises `FileExistsError` if `root` holds anything else, or a demo of another seed or size.
    """
    expected = {"format": _FORMAT, "seed": seed, "size": asdict(size)}
    if not root.exists() or not any(root.iterdir()):
        return {**expected, "images": {}}

    if not (root / MANIFEST).is_file():
        raise FileExistsError(f"{root}: not empty and no demo dataset (no {MANIFEST}); give a new or empty folder")
    found = json.loads((root / MANIFEST).read_text())
    if {key: found.get(key) for key in expected} != expected:
        has = f"seed {found.get('seed')}, size {found.get('size')}"
        raise FileExistsError(f"{root}: holds another demo dataset ({has}); give a new or empty folder")
    return found


def _write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest whole or not at all."""
    _write(root / MANIFEST, json.dumps(manifest, indent=1).encode())


# --- Images ---


def _choose(group: str, index: int) -> tuple[str, Palette]:
    """Choose an image's kind of scene and palette.

    All kinds take turns; over time each kind comes in every palette.
    """
    kinds, palettes = _GROUPS[group].kinds, _GROUPS[group].palettes
    round_, kind = divmod(index, len(kinds))
    return list(kinds)[kind], palettes[(kind + round_) % len(palettes)]


def _make_name(group: str, index: int) -> str:
    """Make the file name, without suffix, of an image."""
    kind, palette = _choose(group, index)
    return f"{group}_{index:03d}_{kind}_{palette.name}"


def _draw(
    group: str, index: int, seed: int, size: DemoSize, noise: Noise, herbarium: Herbarium
) -> tuple[Scene, dict[str, Any]]:
    """Draw an image's scene; return it with its description for the manifest."""
    kind, palette = _choose(group, index)
    # Each image has random numbers of its own, so any subset can be drawn later.
    rng = np.random.default_rng([seed, _GROUPS[group].stream, index])
    size_px = size.width_px, size.height_px
    scene = draw_scene(_GROUPS[group].kinds[kind], palette, size_px, noise, herbarium, rng)
    return scene, {"kind": kind, "palette": palette.name}


def _write_clear(root: Path, name: str, scene: Scene) -> dict[str, Any]:
    """Write a clear picture and its depth; return facts for the manifest."""
    color = scene.canvas.color
    picture = _to_uint8(develop(shrink_to_picture(color) * choose_exposure(color)))

    # The sky has z = inf, and so an inverse depth of 0.
    z = reduce_nearest_z(scene.canvas.z)
    inverse = np.round(65535 * (z.min() / z)).astype(np.uint16)

    _write_image(root / "depth" / f"{name}.png", inverse)
    _write_image(root / "clear" / f"{name}.jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _CLEAR_JPEG_QUALITY])
    return {"near_m": float(z.min())}


def _write_hazy(root: Path, name: str, scene: Scene) -> dict[str, Any]:
    """Write a hazy photograph and its truth; return facts for the manifest."""
    gain = choose_exposure(scene.canvas.color)
    truth = _to_uint8(develop(shrink_to_picture(scene.canvas.color) * gain))

    # The same scene with the same exposure: through fog, by a cheap camera, compressed.
    fog = Fog.draw(scene)
    view, transmission = fog.cover(scene)
    hazy = _to_uint8(develop(take_photograph(shrink_to_picture(view) * gain, scene.rng)))
    hazy = compress_jpeg(hazy, quality=int(scene.rng.integers(*_HAZY_JPEG_QUALITIES)))

    levels = np.round(65535 * shrink_to_picture(transmission)).astype(np.uint16)
    _write_image(root / "hazy_transmission" / f"{name}.png", levels)
    _write_image(root / "hazy_truth" / f"{name}.png", truth)
    _write_image(root / "hazy" / f"{name}.png", hazy)
    return {"fog": asdict(fog)}


def _to_uint8(picture: Array) -> NDArray[np.uint8]:
    """Round a picture in [0, 1] to 0…255."""
    return np.round(picture * 255).astype(np.uint8)


def _write_image(path: Path, image: NDArray[Any], options: list[int] | None = None) -> None:
    """Write grey `H W` or RGB `H W 3`."""
    stored = image if image.ndim == 2 else np.ascontiguousarray(image[..., ::-1])
    _, data = cv2.imencode(path.suffix, stored, options or [])
    _write(path, data.tobytes())


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
