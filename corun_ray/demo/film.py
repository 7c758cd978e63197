"""From linear light to a picture: exposure, tone, final size, and the faults of a cheap camera."""

import cv2
import numpy as np

from corun_ray.demo.light import adjust_tone
from corun_ray.demo.noise import Array
from corun_ray.demo.scene import OVERSAMPLING

_CONTRAST = 0.4


def shrink_to_picture(color: Array) -> Array:
    """Average the oversampled picture down to its final size."""
    size_px = color.shape[1] // OVERSAMPLING, color.shape[0] // OVERSAMPLING
    return cv2.resize(color, size_px, interpolation=cv2.INTER_AREA)


def reduce_nearest_z(z: Array) -> Array:
    """Reduce distances to the final size.

    Each pixel gets the nearest of its samples, in metres, sky = inf.
    """
    height, width = (side // OVERSAMPLING for side in z.shape)
    return z.reshape(height, OVERSAMPLING, width, OVERSAMPLING).min(axis=(1, 3))


def choose_exposure(color: Array) -> float:
    """Choose the gain of an automatic camera for linear light `H W 3`."""
    return float(np.clip(0.2 / np.sqrt(np.mean(color[::4, ::4] ** 2)), 0.7, 1.6))


def develop(color: Array) -> Array:
    """Convert exposed linear light to display values in [0, 1].

    `H W 3`; film-like shoulder, then gamma, then contrast.
    """
    shoulder = 1.12 * (1 - np.exp(-1.6 * np.maximum(color, 0)))
    tone = np.clip(shoulder, 0, 1) ** np.float32(1 / 2.2)
    return tone + np.float32(_CONTRAST) * (3 * tone**2 - 2 * tone**3 - tone)


def take_photograph(color: Array, rng: np.random.Generator) -> Array:
    """Take a shot of exposed linear light `H W 3` with a cheap camera."""
    # Vignette: darker towards the corners.
    height, width = color.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    lit = adjust_tone(color, 1 - np.float32(rng.uniform(0.05, 0.14)) * (x**2 + y**2))

    # The variance of shot noise grows with the light; read noise is constant.
    shot, read = rng.uniform(0.0002, 0.0009), rng.uniform(0.001, 0.004)
    deviation = np.sqrt(np.float32(shot) * np.maximum(lit, 0) + np.float32(read**2))
    return lit + deviation * rng.standard_normal(lit.shape, dtype=np.float32)


def compress_jpeg(picture: Array, quality: int) -> Array:
    """Encode and decode a picture, uint8 RGB `H W 3`, as JPEG."""
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.cvtColor(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)
