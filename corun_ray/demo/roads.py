"""A road through the woods, with its power line."""

from collections.abc import Callable

import numpy as np

from corun_ray.demo.buildings import draw_car
from corun_ray.demo.landscapes import SNOW, colour_meadow, make_detail
from corun_ray.demo.light import adjust_tone, mix, ramp, rgb
from corun_ray.demo.noise import Array
from corun_ray.demo.plants import Tree, TreeKind
from corun_ray.demo.scene import Scene
from corun_ray.demo.terrain import Ground, cast_rays

Course = Callable[[Array], Array]
"""x of the road's middle at the distances z, both in metres."""


def draw_road(scene: Scene) -> None:
    """Draw a road that winds through woods towards hills."""
    hills, far, crowns = scene.draw_field(1500), scene.draw_field(9000, "ridged"), scene.draw_field(240, "ridged")
    swing, wave = scene.uniform(6, 16) * float(scene.rng.choice([-1, 1])), scene.uniform(45, 110)
    climb, verge_m, conifers = scene.uniform(-0.01, 0.05), scene.uniform(6, 9), scene.uniform(0.1, 0.9)

    def middle(z: Array) -> Array:
        """Return x of the road's middle."""
        return swing * (1 - np.cos(z / wave)) * ramp(z, 0, 60)

    def soil(x: Array, z: Array) -> Array:
        """Return the height of the soil: flat on the road."""
        aside = ramp(np.abs(x - middle(z)), 4.5, 30)
        y = climb * z + hills(x, z) * 9 * aside * ramp(z, 10, 200) + 0.8 * aside
        return y + 160 * (1.2 + far(x, z)) * ramp(z, 600, 5000)

    def relief(x: Array, z: Array) -> tuple[Array, Array]:
        """Return the height of soil and distant woods."""
        wooded = ramp(np.abs(x - middle(z)), verge_m, verge_m + 6) * ramp(z, 230, 320)
        return soil(x, z), wooded * (13 + 5 * crowns(x, z))

    def along(z: Array, offset_m: float) -> Array:
        """Return ground points along the road, `offset_m` beside it."""
        x = middle(z) + np.float32(offset_m)
        return np.stack([x, soil(x[None], z[None])[0], z], axis=1)

    # The ground with its distant woods.
    ground = cast_rays(scene.camera, scene.light, relief, 4, 12e3)
    scene.cover(ground, _colour_road(scene, ground, middle))

    # Trees behind the verge, small ones before tall ones; bushes at the edge.
    trees = []
    for foot in scene.scatter(200, 20, 300, soil):
        aside_m = abs(float(foot[0] - middle(foot[2:])[0]))
        if verge_m < aside_m < 45:
            tall = (8, 17) if aside_m > verge_m + 3 else (4, 9)
            kind: TreeKind = "conifer" if scene.rng.random() < conifers else "broadleaf"
            trees.append(Tree(kind, foot, scene.uniform(*tall)))
        elif verge_m - 2 < aside_m < 45:
            trees.append(Tree("bush", foot, scene.uniform(0.5, 1.3)))
    scene.grow(trees, ground)

    # A power line along one side and a car.
    side = float(scene.rng.choice([-1, 1])) * (verge_m - 1)
    _draw_power_line(scene, along(np.arange(30, 520, 38, dtype=np.float32), side))
    lane = along(np.array([scene.uniform(25, 60)], np.float32), 1.7)[0]
    scene.cast_shadows([(lane, 1.4, 1.3)])
    draw_car(scene, lane)


def _colour_road(scene: Scene, ground: Ground, middle: Course) -> Array:
    """Colour road, verge, meadow and forest floor, lit."""
    x, z, palette = ground.x, ground.z, scene.palette
    grain, broad = make_detail(scene, x, ground.y, z), scene.draw_field(300)(x, z)
    across = np.abs(x - middle(z))

    # From the woods to the middle: forest floor, meadow, snow.
    forest_floor = mix(rgb("#54452f"), rgb(palette.leaves[-1]), np.clip(0.3 + 0.3 * grain, 0, 1))
    albedo = mix(colour_meadow(scene, z, broad, grain), forest_floor, ramp(across + 0.8 * grain, 7, 11))
    if palette.snow:
        albedo = mix(albedo, SNOW, ramp(broad + 0.3 * grain, -1.2, 0))

    # Gravel at the edge, asphalt, and markings where they are not worn.
    gravel = adjust_tone(rgb("#8b7b63"), np.exp(0.2 * grain))
    albedo = mix(gravel, albedo, ramp(across + 0.15 * grain, 3.7, 4.6))
    asphalt = adjust_tone(rgb("#57565a"), 1 + 0.14 * grain + 0.1 * broad)
    albedo = mix(asphalt, albedo, ramp(across, 3.5, 3.7))
    marks = (np.abs(across - 3.2) < 0.1) | ((across < 0.08) & (np.mod(z, 9) < 5))
    albedo = mix(albedo, rgb("#d9d6cc"), marks & (grain > -1.3))

    # Distant woods.
    leaves = mix(rgb(palette.conifer), rgb(palette.leaves[0]), np.clip(0.4 + 0.5 * grain, 0, 1))
    albedo = mix(albedo, adjust_tone(leaves, np.exp(0.2 * grain)), ramp(ground.growth, 0.6, 3))
    return scene.light.shade(albedo, ground.sunlit, 0.5 + 0.5 / (1 + ground.steep))


def _draw_power_line(scene: Scene, feet: Array) -> None:
    """Draw poles with three sagging wires.

    The poles stand on the points `N 3`.
    """
    wood = rgb("#4a3d33") * (scene.light.ambient + 0.4 * scene.light.sun)
    for foot in feet:
        thick_px = max(1, round(0.28 * scene.camera.focal_px / foot[2]))
        scene.canvas.draw_line(np.stack([foot, foot + [0, 9, 0]]), thick_px, wood)
        scene.canvas.draw_line(np.stack([foot + [-1.2, 8.3, 0], foot + [1.2, 8.3, 0]]), max(1, thick_px // 2), wood)

    # Wires hang in parabolas between the poles.
    along = np.linspace(0, 1, 10)[:, None]
    for start, end in zip(feet[:-1], feet[1:], strict=True):
        for x in (-1.1, 0.0, 1.1):
            wire = start + (end - start) * along + [x, 8.4, 0] - [0, 5, 0] * along * (1 - along)
            scene.canvas.draw_line(wire, 1, wood * np.float32(0.6))
