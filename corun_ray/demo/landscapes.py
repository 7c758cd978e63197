"""Wild country: alpine valleys, mountain lakes, canyons."""

from collections.abc import Callable

import numpy as np

from corun_ray.demo.light import adjust_tone, mix, ramp, rgb
from corun_ray.demo.noise import Array
from corun_ray.demo.plants import Tree
from corun_ray.demo.scene import Scene, mirror_in_water
from corun_ray.demo.terrain import Ground, Height, cast_rays

SNOW = rgb("#e9eef5")


def draw_alpine(scene: Scene) -> None:
    """Draw a valley below ridges.

    Meadow and path, forest with its tree tops in the relief, rock, snow.
    """
    _draw_mountains(scene, with_lake=False)


def draw_lake(scene: Scene) -> None:
    """Draw the valley with a lake that mirrors the mountains."""
    _draw_mountains(scene, with_lake=True)


def _draw_mountains(scene: Scene, with_lake: bool) -> None:
    """Draw mountains, forest and single trees.

    `with_lake` adds a lake before the mountains.
    """
    peak_m = scene.uniform(330, 560)
    soil = _shape_massif(scene, peak_m, with_lake)
    forest = _shape_forest(scene, tree_line_m=peak_m * scene.uniform(0.45, 0.9))

    def relief(x: Array, z: Array) -> tuple[Array, Array]:
        """Return the height of ground and trees."""
        y = soil(x, z)
        return (np.maximum(y, 0) if with_lake else y), forest(x, y, z)

    # The ground first, in its colours.
    ground = cast_rays(scene.camera, scene.light, relief, 8, 15e3)
    scene.cover(ground, _colour_mountains(scene, ground, peak_m))

    # Single trees on the near slopes, above the water.
    lowest_m, crowd = 0.4 if with_lake else -6.0, scene.uniform(0.1, 0.8)
    spots = scene.scatter(150, 45, 380, soil)
    grove = [foot for foot in spots if foot[1] > lowest_m and scene.rng.random() < crowd]
    scene.grow([_choose_mountain_tree(scene, foot) for foot in grove], ground)
    if with_lake:
        # Water lies where the ground is below 0 and nothing stands before it.
        water = ground.seen & (ground.y < 0.05) & (scene.canvas.z[ground.top_px :] >= ground.z)
        ripple = scene.draw_field(30)(ground.x * np.float32(0.35), ground.z)
        mirror_in_water(scene, ground.top_px, water, ripple, "#1d4a50")

    # A few near trees at both sides frame the picture.
    spots = scene.scatter(14, 30, 60, soil)
    frame = spots[(spots[:, 1] > lowest_m) & (np.abs(spots[:, 0] / spots[:, 2]) > 0.28)]
    scene.grow([_choose_mountain_tree(scene, foot) for foot in frame[:4]], ground)


def _shape_massif(scene: Scene, peak_m: float, with_lake: bool) -> Height:
    """Shape bare ground that rises to ridges.

    Ridges stand on both sides of a valley; the ground is below 0 where the lake will be.
    """
    ridges, rough = scene.draw_field(scene.uniform(8e3, 14e3), "ridged"), scene.draw_field(1900, "ridged")
    hills, valley, near_m = scene.draw_field(2200), scene.uniform(-0.2, 0.2), scene.uniform(400, 900)

    def height(x: Array, z: Array) -> Array:
        """Return the height of the bare ground."""
        aside = np.abs(x / z - valley)

        # Ridges rise with the distance, and to both sides of the valley.
        massif = ramp(z, near_m, 5500) * (aside * 1.7 + 0.4)
        y = massif * (peak_m * (1.4 + ridges(x, z)) + 45 * rough(x, z))
        y += hills(x, z) * (1.5 + 28 * ramp(z, 60, 2200)) + 40 * ramp(aside, 0.2, 0.6) * ramp(z, 60, 500)
        return y - (16 + 25 * ramp(z, 80, 300)) * (1 - ramp(z, 700, 2100)) * ramp(z, 36, 75) if with_lake else y

    return height


def _shape_forest(scene: Scene, tree_line_m: float) -> Callable[[Array, Array, Array], Array]:
    """Shape the trees' height at the soil's (x, y, z).

    Patches below the tree line, pointed tops.
    """
    woods, tops = scene.draw_field(1500), scene.draw_field(260, "ridged")

    def growth(x: Array, y: Array, z: Array) -> Array:
        """Return the height of the trees."""
        too_high = 2.5 * ramp(y, 0.7 * tree_line_m, 1.4 * tree_line_m)
        share = 0.35 + 0.7 * woods(x, z) + 0.4 * ramp(z, 300, 1000) - too_high
        return ramp(share, 0.25, 0.6) * ramp(z, 130, 260) * (y > 1) * (11 + 5 * tops(x, z))

    return growth


def _choose_mountain_tree(scene: Scene, foot: Array) -> Tree:
    """Choose a tree, mostly a conifer."""
    if scene.rng.random() < 0.8:
        return Tree("conifer", foot, scene.uniform(9, 18))
    return Tree("broadleaf", foot, scene.uniform(5, 9))


def make_detail(scene: Scene, x: Array, y: Array, z: Array) -> Array:
    """Make grain for ground near and far.

    Grain is fine on near ground and coarse on far slopes, where fine grain would be lost.
    """
    near, far = scene.draw_field(24, "grain"), scene.draw_field(900, "grain")
    share = ramp(z, 40, 900)
    return near(x + 0.7 * y, z + 1.3 * y) * (1 - 0.7 * share) + far(x + y, z + 2 * y) * share


def colour_meadow(scene: Scene, z: Array, broad: Array, grain: Array) -> Array:
    """Return the albedo of grass.

    Two greens in patches, tufts, and flowers or snow as the palette has it.
    """
    palette = scene.palette
    grass = mix(rgb(palette.grass[0]), rgb(palette.grass[1]), np.clip(0.5 + 0.4 * broad + 0.15 * grain, 0, 1))
    grass = adjust_tone(grass, np.exp(0.27 * grain))
    flower = rgb(str(scene.rng.choice(("#e8d44a", "#f0ece0", "#c06ab0", "#d8673f"))))
    bloom = ramp(grain + 0.7 * broad, 1.7, 2.1) * (z < 160) * (0.7 if not palette.snow else 0.0)
    return mix(grass, flower, bloom)


def _colour_mountains(scene: Scene, ground: Ground, peak_m: float) -> Array:
    """Colour the ground of the mountains, lit."""
    wooded = ramp(ground.growth, 0.5, 4)
    x, y, z = ground.x, ground.y, ground.z
    grain, broad = make_detail(scene, x, y, z), scene.draw_field(700)(x, z)
    palette = scene.palette
    albedo = colour_meadow(scene, z, broad, grain)

    # A path winds through the meadow.
    path = np.abs(x - 14 * np.sin(z / scene.uniform(28, 60)) - scene.uniform(-0.1, 0.1) * z)
    albedo = mix(
        albedo,
        adjust_tone(rgb("#a08a68"), np.exp(0.15 * grain)),
        1 - ramp(path + 0.4 * grain, 1.0, 2.0),
    )

    # Steep and high ground is rock, without trees.
    rock = mix(rgb("#5f574f"), rgb("#a89e90"), np.clip(0.5 + 0.25 * broad + 0.3 * grain, 0, 1))
    stony = ramp(ground.steep + 0.12 * broad + 0.08 * grain + 0.7 * ramp(y, peak_m, 2 * peak_m), 0.7, 1.0)
    albedo = mix(albedo, rock, stony * (1 - wooded))

    # Snow above a line that the season sets, less on steep slopes.
    snow_m = peak_m * (1.9 - 2.6 * palette.snow)
    snow = y + 0.25 * peak_m * broad - (ground.steep - 0.2 * grain) * 0.35 * peak_m
    albedo = mix(albedo, SNOW, ramp(snow, snow_m, snow_m + 0.25 * peak_m))
    frost = 0.35 * ramp(snow, snow_m, snow_m + 0.25 * peak_m)

    # Tree tops cover everything below them, frosted near the snow line.
    leaves = mix(
        rgb(palette.conifer),
        rgb(palette.leaves[0]),
        ramp(broad + 0.4 * grain, 0.3, 1.2) * 0.7,
    )
    albedo = mix(albedo, mix(adjust_tone(leaves, np.exp(0.25 * grain)), SNOW, frost), wooded)
    return scene.light.shade(albedo, ground.sunlit * (1 + 0.15 * grain), 0.5 + 0.5 / (1 + ground.steep))


def draw_canyon(scene: Scene) -> None:
    """Draw terraced mesas of layered red rock above scrub."""
    shape, spurs = scene.draw_field(scene.uniform(2600, 5200)), scene.draw_field(900, "ridged")
    rough = scene.draw_field(500, "ridged")
    tall_m, levels, gap = scene.uniform(130, 230), scene.uniform(2.5, 4), scene.uniform(-0.15, 0.15)

    def height(x: Array, z: Array) -> Array:
        """Return the height of terraced ground."""
        # Mesas rise with the distance, and to both sides of a gap.
        form = shape(x, z)
        raised = np.clip(0.6 * form - 0.25 + 0.8 * ramp(np.abs(x / z - gap), 0.1, 0.6), 0, 1.4)
        raised *= ramp(z + 400 * form + 160 * spurs(x, z), 300, 2000) * ramp(z, 350, 1100)
        raised += 0.02 * rough(x, z) * ramp(z, 60, 300)

        # Terraces: steep at some levels, flat between them.
        step, within = np.floor(raised * levels), np.mod(raised * levels, 1)
        terrace = (step + ramp(within, 0.55, 0.75) + 0.2 * within) / levels
        return terrace * tall_m * (1 + 1.3 * ramp(z, 900, 5000)) + 0.5 * rough(x, z)

    # The ground first, in its colours; then bushes on the low ground.
    ground = cast_rays(scene.camera, scene.light, lambda x, z: (height(x, z), np.zeros_like(x)), 8, 14e3)
    scene.cover(ground, _colour_canyon(scene, ground))
    bushes = [foot for foot in scene.scatter(110, 28, 600, height) if foot[1] < 0.2 * tall_m]
    scene.grow([Tree("bush", foot, scene.uniform(0.8, 2.4)) for foot in bushes], ground)


def _colour_canyon(scene: Scene, ground: Ground) -> Array:
    """Colour the ground of the canyon, lit."""
    x, y, z = ground.x, ground.y, ground.z
    grain, broad = make_detail(scene, x, y, z), scene.draw_field(700)(x, z)

    # Layers of rock follow the height.
    layer = scene.draw_field(110, "grain")(y + 3 * broad, np.zeros_like(y))
    strata = mix(rgb("#a0522f"), rgb("#dea56c"), np.clip(0.5 + 0.35 * layer + 0.25 * grain, 0, 1))

    # Sand and scrub on flat ground, rock on steep ground.
    scrub = colour_meadow(scene, z, broad, grain) * np.float32(0.75)
    sand = mix(rgb("#c08a58"), scrub, ramp(broad + 0.6 * grain, -0.1, 0.6) * 0.8)
    albedo = mix(adjust_tone(sand, np.exp(0.15 * grain)), strata, ramp(ground.steep + 0.05 * grain, 0.35, 0.7))
    if scene.palette.snow:
        albedo = mix(albedo, SNOW, ramp(0.5 * broad + 0.3 * grain - 2.5 * ground.steep, -0.7, 0.1))
    return scene.light.shade(albedo, ground.sunlit * (1 + 0.2 * grain), 0.5 + 0.5 / (1 + ground.steep))
