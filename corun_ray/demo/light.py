"""Season and time of day: the palette of a scene, its light, and the sky."""

from dataclasses import dataclass

import cv2
import numpy as np

from corun_ray.demo.canvas import Viewpoint
from corun_ray.demo.noise import Array, Noise


def rgb(code: str) -> Array:
    """Convert '#rrggbb' to linear light, shape `3`."""
    return (np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)], np.float32) / 255) ** np.float32(2.2)


def mix(low: Array, high: Array, share: Array) -> Array:
    """Mix two colours by `share` (`H W`).

    0 gives `low`, 1 gives `high`; each is one colour or a picture `H W 3`.
    """
    wide_low, wide_high = (_widen(color, share.shape[1]) for color in (low, high))
    mixed = stack_channels(share) * (wide_high - wide_low)
    mixed += wide_low
    return mixed


def adjust_tone(color: Array, tone: Array) -> Array:
    """Make a colour lighter or darker by factors.

    `color` is one colour or a picture `H W 3`; the factors `tone` are `H W`.
    """
    return stack_channels(tone) * _widen(color, tone.shape[1])


def _widen(color: Array, width_px: int) -> Array:
    """Repeat one colour to a row.

    NumPy is far faster with a row. A picture stays as it is.
    """
    return color[None].repeat(width_px, axis=0) if color.ndim == 1 else color


def stack_channels(values: Array) -> Array:
    """Stack `H W` to three equal channels `H W 3`.

    NumPy multiplies two such pictures five times as fast as by broadcasting.
    """
    plane = np.ascontiguousarray(values, np.float32)
    return cv2.merge([plane, plane, plane])


def ramp(value: Array, start: float, end: float) -> Array:
    """Step smoothly from 0 at `start` to 1 at `end`."""
    t = np.clip((value - np.float32(start)) * np.float32(1 / (end - start)), 0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class Palette:
    """Colours as '#rrggbb', elevations of the sun in degrees, `clouds` the covered share of the sky."""

    name: str
    zenith: str
    horizon: str
    sun: str
    sun_strength: float
    ambient: str
    elevation: tuple[float, float]
    clouds: float
    grass: tuple[str, str]
    leaves: tuple[str, ...]
    conifer: str
    bare_trees: float = 0.0
    snow: float = 0.0
    lamps: float = 0.0


PALETTES = (
    Palette("dawn", "#4f7bb5", "#f7c9a0", "#ffb469", 1.5, "#8796c4", (9, 16), 0.45,
            ("#6f8a3c", "#a39a4a"), ("#56753a", "#6b7d35", "#47683a"), "#2c4a35", lamps=0.15),
    Palette("noon", "#2465b8", "#a9cfee", "#fff3da", 1.6, "#7f9fd0", (38, 60), 0.35,
            ("#587d38", "#87994c"), ("#4b7a2c", "#5f8a35", "#3c6b33"), "#2a5234"),
    Palette("autumn", "#3b74bd", "#c9dcea", "#ffdca6", 1.6, "#8496b8", (20, 35), 0.4,
            ("#8a8a3c", "#b79a4c"), ("#c4632a", "#d79a2e", "#a83a26", "#7e7a2c"), "#31502f"),
    Palette("overcast", "#8d9bab", "#ccd4da", "#e8e4dc", 0.45, "#b6c0cc", (35, 55), 0.9,
            ("#5c7f3c", "#7d9150"), ("#46692f", "#587a3a", "#3d5f3c"), "#28463a"),
    Palette("winter", "#4479bd", "#cfe0ef", "#ffe6c4", 1.35, "#8fa9d6", (12, 24), 0.3,
            ("#8c8468", "#a89c7c"), ("#6d5b48", "#7b6a52"), "#2b463c", bare_trees=0.7, snow=0.85),
    Palette("evening", "#27457f", "#f0a271", "#ff9b4f", 1.5, "#6f7fb4", (7, 12), 0.5,
            ("#6d7a38", "#94824a"), ("#55682f", "#6f6a34", "#42582f"), "#263f31", lamps=0.5),
    Palette("spring", "#3a7ccb", "#c6e1f2", "#fff0cf", 1.55, "#88a6d2", (30, 48), 0.5,
            ("#6c9440", "#9aab58"), ("#7fae44", "#d9a3b4", "#94bd58", "#6a9a3c"), "#33603a"),
    Palette("drought", "#4f86c2", "#dcdccb", "#ffe3ae", 1.65, "#9aa4b8", (28, 50), 0.15,
            ("#b89a58", "#cdb172"), ("#6d7a3a", "#85843f", "#5c6b38"), "#3d5537"),
)  # fmt: skip
"""The first six make the clear set, all but the first the hazy one."""


@dataclass(frozen=True)
class Light:
    """A sun at infinity (unit vector towards it, x y z), its colour, and the light of the sky."""

    toward_sun: Array
    sun: Array
    ambient: Array
    lamps: float

    @classmethod
    def draw(cls, palette: Palette, rng: np.random.Generator) -> "Light":
        """Draw the sun's place and take the palette's light."""
        elevation = np.deg2rad(rng.uniform(*palette.elevation))
        azimuth = np.deg2rad(rng.uniform(35, 125) * rng.choice([-1, 1]))
        level = np.cos(elevation)
        direction = [np.sin(azimuth) * level, np.sin(elevation), np.cos(azimuth) * level]
        sun = rgb(palette.sun) * palette.sun_strength
        return cls(np.array(direction, np.float32), sun, rgb(palette.ambient) * 0.75, palette.lamps)

    def shade(self, albedo: Array, facing_sun: Array, openness: Array | None = None) -> Array:
        """Return reflected light `H W 3`.

        `facing_sun` is the cosine to the sun, `openness` the share of the sky seen (None: all).
        """
        light = adjust_tone(self.sun, np.maximum(facing_sun, 0))
        light += self.ambient if openness is None else adjust_tone(self.ambient, openness)
        light *= albedo
        return light


def render_sky(camera: Viewpoint, palette: Palette, light: Light, noise: Noise, rng: np.random.Generator) -> Array:
    """Render gradient, glow of the sun and clouds.

    Linear light `H W 3`, black below the horizon.
    """
    # Nothing in a sky is as fine as a pixel: half the resolution each way is enough.
    bottom_px = min(camera.height_px, int(camera.horizon_px) // 2 * 2 + 2)
    slope_x, slope_y = camera.slope_x[:, ::2], camera.slope_y[:bottom_px:2]
    path = camera.path_per_depth[:bottom_px:2, ::2]
    sun = light.toward_sun

    # Gradient from horizon to zenith.
    sky = mix(rgb(palette.zenith), rgb(palette.horizon), np.exp(-4.5 * np.maximum(slope_y / path, 0)))

    # A wide and a narrow glow around the sun.
    cosine = np.maximum((slope_x * sun[0] + slope_y * sun[1] + sun[2]) / path, 0)
    sky += stack_channels(0.3 * cosine**8 + 0.5 * cosine**64) * light.sun

    # Clouds: a layer at one height, sampled where the lines of sight cross it.
    layer_m = 1500 / (np.maximum(slope_y, 0) + np.float32(0.06))
    x, z = slope_x * layer_m, np.broadcast_to(layer_m, path.shape)
    field = noise.draw_field(rng, rng.uniform(9e3, 22e3))
    density = field(x, z)

    # Clouds are lit where they are thinner towards the sun.
    behind = density - field(x + np.float32(250 * sun[0]), z + np.float32(250 * sun[2]))
    cover = np.clip((density - 1.4 + 2.6 * palette.clouds) / 1.5, 0, 0.92) * np.clip(slope_y * 14, 0, 1)
    cloud = light.shade(np.ones(3, np.float32), np.clip(0.42 + 0.5 * behind, 0.2, 0.9), np.full_like(cover, 0.7))
    sky = mix(sky, cloud, cover)

    # Enlarge to the picture.
    picture = np.zeros((camera.height_px, camera.width_px, 3), np.float32)
    picture[:bottom_px] = cv2.resize(sky, (camera.width_px, bottom_px), interpolation=cv2.INTER_LINEAR)
    return picture
