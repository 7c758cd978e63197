"""Relief by ray casting a height field: every pixel gets its exact distance, slope and light."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.demo.canvas import Viewpoint
from corun_ray.demo.light import Light
from corun_ray.demo.noise import Array

Height = Callable[[Array, Array], Array]
"""Height of the soil in metres at world (x, z), arrays of one 2-D shape."""
Relief = Callable[[Array, Array], tuple[Array, Array]]
"""The same, and the height in metres of what grows on it."""


@dataclass(frozen=True)
class Ground:
    """What pixels show of the ground; where `seen` is false the rest is arbitrary.

    Arrays `h W`: the picture's rows from `top_px` down, above which there is only sky. `sunlit` is the cosine
    towards the sun, 0 in cast shadow; `steep` the slope's tangent; `growth` the height in metres of the
    plants that `y` includes.
    """

    top_px: int
    seen: NDArray[np.bool_]
    x: Array
    y: Array
    z: Array
    sunlit: Array
    steep: Array
    growth: Array


def cast_rays(camera: Viewpoint, light: Light, relief: Relief, near_m: float, far_m: float, steps: int = 400) -> Ground:
    """March all columns from near to far at once.

    Between samples the ground is a straight line.
    """
    # Near ground is seen at a steep angle and needs few steps, far ridges need many.
    progress = np.linspace(0, 1, steps, dtype=np.float32)[:, None]
    step_z = np.float32(near_m) * np.float32(far_m / near_m) ** progress**0.8
    # Every second column is as fine as the final picture.
    x = (camera.slope_x[:, ::2] + camera.slope_x[:, 1::2]) / 2 * step_z

    # Slope of the line of sight to the surface, at each step of each column.
    soil, growth = relief(x, np.ascontiguousarray(np.broadcast_to(step_z, x.shape)))
    y = soil + growth
    slope = cv2.resize((y - np.float32(camera.height_m)) / step_z, (camera.width_px, steps))

    # The first step that covers a pixel; above `top_px` there is only sky.
    first = _find_first_covering(camera, np.maximum.accumulate(slope, axis=0))
    top_px = int(np.argmax((first < steps).any(axis=1)))
    first, slope_y = first[top_px:], camera.slope_y[top_px:]

    # The samples before and behind the crossing.
    behind = np.clip(first, 1, steps - 1)
    columns = np.arange(camera.width_px)[None]
    near_z, far_z = step_z[behind - 1, 0], step_z[behind, 0]
    # Where the line of sight crosses the straight ground between the two samples.
    gain, rest = near_z * (slope_y - slope[behind - 1, columns]), far_z * (slope[behind, columns] - slope_y)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.clip(np.nan_to_num(gain / (gain + rest)), 0, 1)
    z = near_z + (far_z - near_z) * part

    # Sunlight, steepness and growth, interpolated at the crossing.
    surface = cv2.merge([*_light_relief(light, x, y, step_z), growth])
    map_x = np.broadcast_to(columns.astype(np.float32) / 2 - np.float32(0.25), z.shape)
    sampled = cv2.remap(
        surface, map_x, (behind - 1 + part).astype(np.float32), cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE
    )
    height_m = slope_y * z + np.float32(camera.height_m)
    return Ground(top_px, first < steps, camera.slope_x * z, height_m, z, *cv2.split(sampled))


def _find_first_covering(camera: Viewpoint, horizon_slope: Array) -> NDArray[np.int64]:
    """Find the first step that covers each pixel.

    The ground of that step rises above the line of sight; `steps` where none does.
    """
    steps, width = horizon_slope.shape

    # The row up to which each step reaches.
    top = np.ceil(camera.horizon_px - camera.focal_px * horizon_slope - 0.5)
    top = np.clip(top, 0, camera.height_px).astype(np.int64)

    # Count the steps that reach each row: all later ones cover it.
    reached = np.bincount((top * width + np.arange(width)).ravel(), minlength=(camera.height_px + 1) * width)
    return steps - np.cumsum(reached.reshape(-1, width)[:-1], axis=0)


def _light_relief(light: Light, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Compute sunlight and steepness on the grid of steps.

    Sunlight is the cosine to the sun, 0 where other ground stands between.
    """
    # Slopes across the picture and along the rays, from differences between samples.
    along_x, along_ray = np.empty_like(y), np.empty_like(y)
    along_x[:, :-1] = (y[:, 1:] - y[:, :-1]) / (x[:, 1:2] - x[:, :1])
    along_x[:, -1] = along_x[:, -2]
    along_ray[:-1] = (y[1:] - y[:-1]) / (z[1:] - z[:-1])
    along_ray[-1] = along_ray[-2]
    along_z = along_ray - along_x * x / z

    # The surface's steepness, and its cosine towards the sun.
    steep = np.hypot(along_x, along_z)
    sun = light.toward_sun
    facing = (sun[1] - along_x * sun[0] - along_z * sun[2]) / np.sqrt(1 + steep**2)
    # Shadows fall along x: a point is lit if no other rises above its ray towards the sun.
    above_ray = y - x * (sun[1] / np.copysign(max(abs(sun[0]), 0.2), sun[0]))
    order = np.s_[:, ::-1] if sun[0] > 0 else np.s_[:, :]
    blocked_m = np.maximum.accumulate(above_ray[order], axis=1)[order] - above_ray
    return facing * np.clip(1 - blocked_m / (0.004 * z + 0.5), 0, 1), steep
