"""The kinds of scene, and how one becomes a picture with depth."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from corun_ray.demo.landscapes import alpine, canyon, lake
from corun_ray.demo.light import Palette
from corun_ray.demo.noise import Noise
from corun_ray.demo.plants import Herbarium
from corun_ray.demo.roads import road
from corun_ray.demo.scene import Scene
from corun_ray.demo.towns import skyline, street

Range = tuple[float, float]


@dataclass(frozen=True)
class Kind:
    """What is drawn, and from where: height of the eye, row of the horizon, focal length in widths."""

    draw: Callable[[Scene], None]
    eye_m: Range
    horizon: Range
    zoom: Range


KINDS = {
    "alpine": Kind(alpine, (8, 14), (0.55, 0.68), (0.9, 1.3)),
    "street": Kind(street, (2.5, 9), (0.42, 0.58), (0.75, 1.1)),
    "lake": Kind(lake, (6, 11), (0.52, 0.62), (0.85, 1.2)),
    "skyline": Kind(skyline, (9, 18), (0.54, 0.66), (0.85, 1.2)),
    "road": Kind(road, (3, 6), (0.5, 0.6), (0.8, 1.1)),
    "canyon": Kind(canyon, (8, 20), (0.5, 0.65), (0.85, 1.2)),
}


def draw_scene(
    kind: Kind,
    palette: Palette,
    size_px: tuple[int, int],
    noise: Noise,
    herbarium: Herbarium,
    rng: np.random.Generator,
) -> Scene:
    """Draws a scene of the kind for a picture of `size_px` (width, height), at `OVERSAMPLING` times that."""
    eye_m, horizon, zoom = (float(rng.uniform(*span)) for span in (kind.eye_m, kind.horizon, kind.zoom))
    scene = Scene.begin(size_px, palette, noise, herbarium, rng, eye_m, horizon, zoom)
    kind.draw(scene)
    return scene
