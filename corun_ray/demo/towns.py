"""Towns: a street in perspective, and a skyline across the water."""

import numpy as np

from corun_ray.demo.buildings import PLASTER, Material, Shadow, draw_block, draw_car, draw_face, make_facade, make_paint
from corun_ray.demo.landscapes import SNOW
from corun_ray.demo.light import adjust_tone, mix, rgb
from corun_ray.demo.noise import Array
from corun_ray.demo.plants import Tree, TreeKind
from corun_ray.demo.scene import Scene, mirror_in_water

_FAR_M = 700


def draw_street(scene: Scene) -> None:
    """Draw a street between office blocks.

    Straight, with lamps, trees and cars.
    """
    half_m, road_m = scene.uniform(11, 15), scene.uniform(5, 7.5)

    # Both sides of the street, and the shadow of the side towards the sun.
    plots = {side: _plan_plots(scene) for side in (-1, 1)}
    shadow = _make_street_shadow(scene, plots, half_m)
    _draw_pavement(scene, half_m, road_m, shadow)

    # Blocks along the street; tall ones carry a shed.
    roof, shed, deep_m = make_paint(scene, "#6a6663"), make_paint(scene, "#77726c"), 26.0
    for side, row in plots.items():
        for start, width, height in row:
            foot = np.array([side * (half_m + deep_m / 2 + scene.uniform(0, 0.8)), 0, start + width / 2])
            draw_block(scene, foot, (deep_m, height, width), 0, _make_office_wall(scene), roof, shadow)
            if height > 24:
                draw_block(scene, foot + [0, height, 0], (deep_m / 2, 4, width / 2), 0, shed, roof)
    _draw_landmark(scene)
    _draw_furniture(scene, half_m, road_m, shadow)


def _plan_plots(scene: Scene) -> list[tuple[float, float, float]]:
    """Plan the buildings along one side.

    Returns start, width and height in metres of each, with a gap at each crossing.
    """
    plots, z, typical = [], scene.uniform(-12, 0), scene.uniform(12, 34)
    while z < _FAR_M * 0.8:
        width = scene.uniform(11, 27)
        plots.append((z, width, typical * scene.uniform(0.6, 1.7)))
        z += width + (14 if scene.rng.random() < 0.2 else 0)
    return plots


def _make_street_shadow(scene: Scene, plots: dict[int, list[tuple[float, float, float]]], half_m: float) -> Shadow:
    """Make the shadow of the side that hides the sun."""
    sun = scene.light.toward_sun
    side = 1 if sun[0] > 0 else -1

    # The height of the shading side at each distance.
    skyline_m = np.zeros(_FAR_M + 200, np.float32)
    for start, width, height in plots[side]:
        skyline_m[max(0, int(start) + 100) : int(start + width) + 100] = height

    def shadow(x: Array, y: Array, z: Array) -> Array:
        """Return the share of the sun at a point."""
        # Follow the ray to the sun up to that side, and compare heights.
        way = np.maximum(half_m - side * x, 0) / max(abs(float(sun[0])), 0.05)
        at = np.clip(z + way * sun[2] + 100, 0, len(skyline_m) - 1).astype(np.int32)
        return np.clip((y + way * sun[1] - skyline_m[at]) * 0.7 + 0.5, 0, 1).astype(np.float32)

    return shadow


def _make_office_wall(scene: Scene) -> Material:
    """Make an office wall with random colour and windows."""
    color = str(scene.rng.choice(PLASTER))
    return make_facade(scene, color, scene.uniform(2.2, 4), scene.uniform(3, 3.8), scene.uniform(0.4, 0.85))


def _draw_pavement(scene: Scene, half_m: float, road_m: float, shadow: Shadow) -> None:
    """Draw road, kerbs and pavements."""
    grain, worn = scene.draw_field(9, "grain"), scene.draw_field(60)

    def paint(u: Array, v: Array, z: Array) -> Array:
        """Paint asphalt, slabs, kerbs and markings, lit."""
        x = u - 400

        # Kerbs, joints between slabs, and markings.
        across = np.abs(x)
        kerb = np.abs(across - road_m - 0.15) < 0.15
        joints = (across > road_m) & ((np.mod(z, 1.5) < 0.06) | (np.mod(across, 1.5) < 0.05)) & (z < 60)
        dashes = (across < 0.09) & (np.mod(z, 6) < 3)
        zebra = (np.abs(np.mod(z, 110) - 34) < 2) & (across < road_m - 0.3) & (np.mod(x, 1.1) < 0.55)

        # Slabs or asphalt, worn.
        albedo = mix(rgb("#98928a"), rgb("#5a5a5e"), across < road_m)
        albedo = mix(mix(albedo, rgb("#716c66"), joints), rgb("#b5b0a6"), kerb)
        rough, smooth = grain(x, z), worn(x, z)
        albedo = adjust_tone(mix(albedo, rgb("#dcdad2"), dashes | zebra), 1 + 0.16 * rough + 0.12 * smooth)
        if scene.palette.snow:
            slush = 0.6 * smooth + 0.9 * scene.palette.snow * (across > road_m) - 0.1 + 0.2 * rough
            albedo = mix(albedo, SNOW, np.clip(slush, 0, 1))

        # The middle of the street sees more of the sky.
        lit = shadow(x, np.zeros_like(x), z) * scene.light.toward_sun[1]
        return scene.light.shade(albedo, lit, 0.6 + 0.3 * np.clip(1 - across / half_m, 0, 1))

    corners = np.array([[-400, 0, 1], [400, 0, 1], [400, 0, 5000], [-400, 0, 5000]], float)
    scene.canvas.draw_polygon(corners, paint)


def _draw_landmark(scene: Scene) -> None:
    """Draw a tower that closes the view."""
    centre, height_m = np.array([scene.uniform(-8, 8), 0, _FAR_M]), scene.uniform(70, 130)
    wall, top = _make_office_wall(scene), make_paint(scene, "#5f6468")
    draw_block(scene, centre, (70, height_m * 0.4, 30), 0.2, wall, top)
    draw_block(scene, centre, (24, height_m, 24), scene.uniform(0, 0.7), wall, top)


def _draw_furniture(scene: Scene, half_m: float, road_m: float, shadow: Shadow) -> None:
    """Draw lamps, trees and cars."""
    rng = scene.rng
    iron = rgb("#2b2d30") * (scene.light.ambient + 0.3 * scene.light.sun)

    # Street lamps on both sides.
    for z in np.arange(scene.uniform(16, 30), 230, 28):
        for side in (-1, 1):
            x = side * (road_m + 0.6)
            pole = np.array([[x, 0, z], [x, 7, z], [x - side * 1.0, 7.6, z], [x - side * 2.4, 7.6, z]])
            scene.canvas.draw_line(pole, max(1, round(0.16 * scene.camera.focal_px / z)), iron)

    # Trees along both kerbs, with gaps.
    kind: TreeKind = "broadleaf" if rng.random() < 0.7 else "poplar"
    x, rows_z = road_m + 2.4, np.arange(scene.uniform(20, 34), 260, scene.uniform(9, 22))
    feet = [np.array([side * x, 0.0, z + scene.uniform(-2, 2)]) for side in (-1, 1) for z in rows_z]
    scene.grow([Tree(kind, foot, scene.uniform(5.5, 9)) for foot in feet if rng.random() < 0.75])

    # Cars in lanes and at the kerbs.
    cars, z = [], scene.uniform(18, 26)
    while z < 220:
        cars.append(np.array([rng.choice([-0.5, 0.5, -0.86, 0.86]) * road_m, 0, z]))
        z += scene.uniform(7, 22)
    scene.cast_shadows([(foot, 1.4, 1.3) for foot in cars])
    for foot in cars:
        draw_car(scene, foot, shadow)


def draw_skyline(scene: Scene) -> None:
    """Draw towers across the water.

    With a bridge, boats and their reflections.
    """
    bank_m, near_m = scene.uniform(260, 520), scene.camera.height_m * 2.6

    # Both banks, the far one with its wall.
    _draw_bank(scene, 1, near_m * 1.1)
    _draw_bank(scene, bank_m, 6e3)
    foot, top = [[-900, 0, bank_m], [900, 0, bank_m]], [[900, 3, bank_m], [-900, 3, bank_m]]
    draw_face(scene, np.array(foot + top), make_paint(scene, "#8d867c", 0.6))

    # Towers, and trees before them.
    _draw_towers(scene, bank_m, centre=scene.uniform(-0.25, 0.25))
    x, z = scene.rng.uniform(-0.6, 0.6, 70) * bank_m, bank_m + scene.rng.uniform(3, 14, 70)
    feet = np.stack([x, np.ones(70), z], axis=1)
    scene.grow([Tree("broadleaf", foot, scene.uniform(6, 12)) for foot in feet])
    if scene.rng.random() < 0.5:
        _draw_bridge(scene, bank_m * 0.8)

    # The river mirrors everything drawn so far; boats come after it.
    _fill_river(scene)
    for _ in range(scene.rng.integers(2, 6)):
        _draw_sailboat(scene, scene.uniform(70, bank_m * 0.8))

    # Near trees at both sides frame the picture.
    frame = [np.array([side * scene.uniform(0.3, 0.5) * near_m, 1.0, near_m]) for side in (-1, 1)]
    scene.grow([Tree("broadleaf", foot, scene.uniform(7, 12)) for foot in frame if scene.rng.random() < 0.7])


def _draw_bank(scene: Scene, start_m: float, end_m: float) -> None:
    """Draw a grassy bank between two distances."""
    grain, palette = scene.draw_field(20, "grain"), scene.palette

    def paint(u: Array, v: Array, z: Array) -> Array:
        """Paint grass or snow, lit."""
        tufts = grain(u, v)
        grass = mix(rgb(palette.grass[0]), rgb(palette.grass[1]), np.clip(0.5 + 0.4 * tufts, 0, 1))
        grass = mix(grass, SNOW, np.full(u.shape, 0.8 * palette.snow))
        sunlit = np.full(u.shape, scene.light.toward_sun[1])
        return scene.light.shade(adjust_tone(grass, np.exp(0.2 * tufts)), sunlit)

    wide_m = 4e3
    corners = [[-wide_m, 1, start_m], [wide_m, 1, start_m], [wide_m, 1, end_m], [-wide_m, 1, end_m]]
    scene.canvas.draw_polygon(np.array(corners), paint)


def _fill_river(scene: Scene) -> None:
    """Fill the open rest below the horizon with water.

    The water's height is 0.
    """
    camera = scene.camera
    top_px = int(camera.horizon_px) + 1
    z = scene.canvas.z[top_px:]

    # Water fills every pixel whose ray meets height 0 before anything else.
    water_z = np.broadcast_to(camera.height_m / -camera.slope_y[top_px:], z.shape)
    water = water_z < z
    np.copyto(z, water_z, where=water)

    # Ripples, sampled no further away than 2 km.
    ripple = scene.draw_field(60)(camera.slope_x * water_z * np.float32(0.3), np.minimum(water_z, 2000))
    mirror_in_water(scene, top_px, water, 1.5 * ripple, "#20454f")


def _draw_towers(scene: Scene, bank_m: float, centre: float) -> None:
    """Draw towers from near to far, tallest about `centre`."""
    top = make_paint(scene, "#55585c")
    for z in np.sort(scene.uniform(18, 40) + bank_m + 700 * scene.rng.random(58) ** 1.3):
        x = scene.uniform(-0.62, 0.62) * z

        # Towers are tallest in the centre of the town.
        crowd = np.exp(-(((x / z - centre) / 0.2) ** 2))
        height = scene.uniform(14, 45) + 170 * crowd * scene.rng.random() ** 1.6 * min(1, (z - bank_m) / 150)
        size = (scene.uniform(16, 38), height, scene.uniform(16, 34))
        foot, turn = np.array([x, 1, z]), scene.uniform(-0.5, 0.5)
        wall = _make_office_wall(scene)
        draw_block(scene, foot, size, turn, wall, top)
        if height > 80:
            # Tall towers have a crown and a mast.
            crown = size[0] * 0.6, height * 0.14, size[2] * 0.6
            draw_block(scene, foot + [0, height, 0], crown, turn, wall, top)
            mast = foot + np.array([[0, height * 1.14, 0], [0, height * 1.14 + 25, 0]])
            scene.canvas.draw_line(mast, 1, rgb("#3a3c40") * scene.light.ambient)


def _draw_bridge(scene: Scene, z: float) -> None:
    """Draw a suspension bridge across the whole view."""
    color = str(scene.rng.choice(["#9c3b2c", "#6c7780", "#4d6a62"]))
    steel, rope = make_paint(scene, color), rgb(color) * (scene.light.ambient + 0.4 * scene.light.sun)

    # The deck, then pylons with cables and hangers.
    span_m = 0.58 * z
    pylons = scene.uniform(-0.1, 0.1) * z + span_m * np.array([-1.5, -0.5, 0.5, 1.5])
    draw_block(scene, np.array([0, 11, z]), (4 * z, 2.2, 9), 0, steel, steel)
    t = np.linspace(0, 1, 24)
    for x in pylons:
        draw_block(scene, np.array([x, 0, z]), (5, 48, 7), 0, steel, steel)
        cable = np.stack([x + span_m * t, 48 - 132 * t * (1 - t), np.full_like(t, z - 4)], axis=1)
        scene.canvas.draw_line(cable, 2, rope)
        for top in cable:
            scene.canvas.draw_line(np.stack([top, [top[0], 13, top[2]]]), 1, rope)


def _draw_sailboat(scene: Scene, z: float) -> None:
    """Draw a sailboat at distance `z`."""
    foot = np.array([scene.uniform(-0.4, 0.4) * z, 0, z])
    hull, deck = make_paint(scene, "#e4e0d6"), make_paint(scene, "#8a6a45")
    sail = make_paint(scene, str(scene.rng.choice(["#f1eee6", "#d8b27a", "#b5483c"])))
    draw_block(scene, foot, (6, 0.9, 2), 0, hull, deck)
    for left, right in ((-2.6, 0), (0, 2.2)):
        draw_face(scene, foot + np.array([[left, 1.4, 0], [right, 1.4, 0], [0, 9.5, 0]]), sail)
