"""A scene in the making: camera, light and picture, and what every kind of scene does with them."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.demo.canvas import Canvas, Viewpoint
from corun_ray.demo.light import Light, Palette, mix, render_sky, rgb
from corun_ray.demo.noise import Array, Field, Noise, NoiseKind
from corun_ray.demo.plants import Herbarium, Tree
from corun_ray.demo.terrain import Ground, Height

OVERSAMPLING = 2


@dataclass(frozen=True)
class Scene:
    camera: Viewpoint
    palette: Palette
    light: Light
    noise: Noise
    herbarium: Herbarium
    rng: np.random.Generator
    canvas: Canvas

    @classmethod
    def begin(
        cls, size_px: tuple[int, int], palette: Palette, noise: Noise, herbarium: Herbarium,
        rng: np.random.Generator, eye_m: float, horizon: float, zoom: float,
    ) -> "Scene":  # fmt: skip
        """Begin a scene: nothing yet under its sky.

        `size_px` is (width, height), `horizon` its row as a share of the height.
        """
        width, height = (side * OVERSAMPLING for side in size_px)
        camera = Viewpoint(width, height, zoom * width, horizon * height, eye_m)
        light = Light.draw(palette, rng)
        canvas = Canvas(camera, render_sky(camera, palette, light, noise, rng))
        return cls(camera, palette, light, noise, herbarium, rng, canvas)

    def draw_field(self, size_m: float, kind: NoiseKind = "fractal") -> Field:
        """Draw a noise field; see `Noise.draw_field`."""
        return self.noise.draw_field(self.rng, size_m, kind)

    def uniform(self, low: float, high: float) -> float:
        """Draw a number, uniformly."""
        return float(self.rng.uniform(low, high))

    def scatter(self, count: int, near_m: float, far_m: float, height: Height) -> Array:
        """Scatter points `N 3` on the ground.

        They are evenly spread over the picture's columns and the log of distance.
        """
        z = np.exp(self.rng.uniform(np.log(near_m), np.log(far_m), count)).astype(np.float32)
        edge = self.camera.slope_x[0, -1] * 1.1
        x = (z * self.rng.uniform(-edge, edge, count)).astype(np.float32)
        return np.stack([x, height(x[None], z[None])[0], z], axis=1)

    def grow(self, trees: list[Tree], ground: Ground | None = None) -> None:
        """Cast the trees' shadows, then draw the trees.

        `ground` tells which of them stand in shade.
        """
        self.cast_shadows([(tree.foot, tree.height_m, tree.height_m * 0.22) for tree in trees])
        # From near to far, so that hidden ones are found out before they are painted.
        for tree in sorted(trees, key=lambda tree: float(tree.foot[2])):
            sunlit = 1.0 if ground is None else self._look_up_sunlight(tree.foot, ground)
            self.herbarium.draw(self.canvas, tree, self.light, self.palette, sunlit, self.rng)

    def cover(self, ground: Ground, color: Array) -> None:
        """Draw the ground in the colours of its pixels.

        `color` is `h W 3`. The ground must come first.
        """
        seen = ground.seen.astype(np.uint8)
        cv2.copyTo(color, seen, self.canvas.color[ground.top_px :])
        cv2.copyTo(ground.z, seen, self.canvas.z[ground.top_px :])

    def cast_shadows(self, objects: list[tuple[Array, float, float]]) -> None:
        """Shade an ellipse of ground behind each object.

        Objects are given by foot, height and radius in metres.
        """
        sun = self.light.toward_sun
        level = float(np.hypot(sun[0], sun[2]))

        # Outline of an ellipse that begins at the foot and leads away from the sun.
        away, turn = -sun / level, np.linspace(0, 2 * np.pi, 14, endpoint=False, dtype=np.float32)
        outlines = []
        for foot, height_m, radius_m in objects:
            forward = min(height_m * level / sun[1], 2.2 * height_m) / 2 * (1 + np.cos(turn))
            side = np.float32(radius_m) * np.sin(turn)
            x, z = foot[0] + away[0] * forward - away[2] * side, foot[2] + away[2] * forward + away[0] * side
            outlines.append(np.stack([x, np.full_like(x, foot[1]), z], axis=1))

        # Shaded ground keeps the light of the sky: one factor for all channels.
        ambient = self.light.ambient
        self.canvas.darken(outlines, float((ambient / (ambient + 0.7 * self.light.sun * sun[1])).mean()))

    def _look_up_sunlight(self, foot: Array, ground: Ground) -> float:
        """Look up the sunlight at a foot, 0.1 … 1."""
        column, row = self.camera.project(foot[None])[0].astype(int)
        row -= ground.top_px
        inside = 0 <= row < ground.z.shape[0] and 0 <= column < self.camera.width_px
        return 1.0 if not inside else float(np.clip(ground.sunlit[row, column] * 4 + 0.1, 0.1, 1))


def mirror_in_water(scene: Scene, top_px: int, water: NDArray[np.bool_], ripple: Array, deep: str) -> None:
    """Paint water with the mirror image of its shores.

    Each column mirrors what stands above its shore. `water` and `ripple` (about unit deviation) are `h W`: the
    picture's rows from `top_px` down.
    """
    height, width = water.shape

    # The lowest row above each water pixel that is not water: its shore.
    rows = np.arange(height, dtype=np.float32)[:, None]
    shore = np.maximum.accumulate(np.where(water, np.float32(-1), rows), axis=0)

    # Mirror each row at the shore, with ripples that grow downwards.
    mirrored = 2 * shore + 1 - rows + ripple * (1.5 + 0.1 * (rows - shore))
    mirrored = np.clip(mirrored, -top_px, shore) + np.float32(top_px)
    columns = np.broadcast_to(np.arange(width, dtype=np.float32)[None], water.shape)
    image = cv2.remap(scene.canvas.color, columns, mirrored, cv2.INTER_LINEAR)

    # Fresnel: water mirrors more at flat angles and shows its own colour at steep ones.
    sine = np.abs(scene.camera.slope_y[top_px:]) / scene.camera.path_per_depth[top_px:]
    body = rgb(deep) * (scene.light.ambient + 0.4 * scene.light.sun)
    color = mix(body, image, 0.12 + 0.72 * np.clip(1 - sine, 0, 1) ** 6)
    scene.canvas.color[top_px:][water] = color[water]
