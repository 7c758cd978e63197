"""The fog of the "real" hazy photographs, deliberately unlike the haze that training synthesises."""

from dataclasses import dataclass

import cv2
import numpy as np

from corun_ray.demo.film import choose_exposure
from corun_ray.demo.light import adjust_tone, mix, rgb
from corun_ray.demo.noise import Array
from corun_ray.demo.scene import Scene

# The sky is infinitely far; fog reckons with this distance.
_SKY_M = 6e4
_HUES = ("#e2e5e8", "#d6e0ea", "#e8dfcf", "#dcd6d0")


@dataclass(frozen=True)
class Fog:
    """A day's fog over a scene.

    `extinction_per_m` at the height of the eye, thinning by e every `scale_height_m`; `patchiness` is the
    deviation of the optical depth from place to place, as a share; `sun_tint` warms the airlight (`hue` as
    '#rrggbb' and its `brightness`) towards the sun.
    """

    extinction_per_m: float
    scale_height_m: float
    patchiness: float
    sun_tint: float
    brightness: float
    hue: str

    @classmethod
    def draw(cls, scene: Scene) -> "Fog":
        """Draw a light to dense fog that suits the scene's distances."""
        solid = scene.canvas.z[np.isfinite(scene.canvas.z)]
        reach_m = float(np.percentile(solid[::7], 75))
        return cls(
            extinction_per_m=scene.uniform(0.6, 1.6) / reach_m,
            scale_height_m=reach_m * scene.uniform(0.25, 1.0),
            patchiness=scene.uniform(0.1, 0.35),
            sun_tint=scene.uniform(0.1, 0.45),
            brightness=scene.uniform(0.42, 0.85) / choose_exposure(scene.canvas.color),
            hue=str(scene.rng.choice(_HUES)),
        )

    def compute_transmission(self, scene: Scene) -> Array:
        """Compute the transmission, `H W` in (0, 1].

        Beer-Lambert along each line of sight through air that thins with height.
        """
        # Mean density along the line of sight: (1 − e^−climb) / climb of the exponential atmosphere.
        camera = scene.camera
        z = np.minimum(scene.canvas.z, np.float32(_SKY_M))
        climb = np.clip(camera.slope_y * z / np.float32(self.scale_height_m), -4, None)
        thinning = np.where(np.abs(climb) < 1e-3, 1, -np.expm1(-climb) / np.where(climb == 0, 1, climb))

        # Optical depth, uneven from place to place.
        depth = np.float32(self.extinction_per_m) * z * camera.path_per_depth * thinning
        patches = np.maximum(1 + self.patchiness * _draw_drift(scene, (4, 3)), 0.2)
        return np.exp(-depth * patches).astype(np.float32)

    def compute_airlight(self, scene: Scene) -> Array:
        """Compute the airlight, `H W 3`, linear light.

        Brighter and warmer towards the sun, duller below, uneven throughout.
        """
        # Squared cosine between the line of sight and the direction to the sun.
        camera, sun = scene.camera, scene.light.toward_sun
        toward = camera.slope_x * sun[0] + camera.slope_y * sun[1] + sun[2]
        toward = np.clip(toward / camera.path_per_depth, 0, 1) ** 2

        grey = rgb(self.hue) * 0.6 + rgb(scene.palette.horizon) * 0.4
        air = mix(grey, rgb(scene.palette.sun), self.sun_tint * (toward + 0.15))
        uneven = 1 + 0.07 * _draw_drift(scene, (3, 2)) + 0.25 * np.clip(camera.slope_y, -0.5, 0.5)
        return adjust_tone(air, self.brightness * uneven * (1 + 0.25 * toward))

    def cover(self, scene: Scene) -> tuple[Array, Array]:
        """Show the scene through the fog.

        Returns the view in linear light, `H W 3`, and its transmission, `H W` in (0, 1].
        """
        # The airlight is drawn before the transmission: the order decides the random numbers.
        airlight = self.compute_airlight(scene)
        transmission = self.compute_transmission(scene)
        return mix(airlight, scene.canvas.color, transmission), transmission


def _draw_drift(scene: Scene, lattice: tuple[int, int]) -> Array:
    """Draw a slow variation over the picture, `H W`.

    Wider than high, of about unit deviation.
    """
    coarse = scene.rng.standard_normal((lattice[0] + 3, lattice[1] + 3), dtype=np.float32)
    size_px = scene.camera.width_px, scene.camera.height_px
    return cv2.resize(coarse, size_px, interpolation=cv2.INTER_CUBIC) * np.float32(1.2)
