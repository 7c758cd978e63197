"""Things people build, as flat faces: houses, office blocks, cars."""

from collections.abc import Callable

import numpy as np

from corun_ray.demo.canvas import compute_cross_product
from corun_ray.demo.light import adjust_tone, mix, rgb
from corun_ray.demo.noise import Array
from corun_ray.demo.scene import Scene

Material = Callable[[Array, Array, Array], tuple[Array, Array | float]]
"""(u, v, z in metres, `H W`) -> albedo and emitted light, `H W 3`; u along a wall, v above its foot."""
Shadow = Callable[[Array, Array, Array], Array]
"""World x, y, z in metres -> share of the sun that arrives there."""

PLASTER = ("#d8cbb4", "#c9a27c", "#b7685a", "#d9d4cc", "#8d9aa0", "#a8604a", "#e0c48a", "#7c6a5c")
CARS = ("#b3201f", "#1f4f99", "#e6e6e2", "#20242a", "#c79a1c", "#5c6c70", "#2f6b46")


def make_paint(scene: Scene, color: str, stripe_m: float = 0.0) -> Material:
    """Make weathered paint.

    With courses (bricks, planks, tiles) `stripe_m` apart, unless that is 0.
    """
    field, albedo = scene.draw_field(6, "grain"), rgb(color)

    def material(u: Array, v: Array, z: Array) -> tuple[Array, float]:
        """Paint with grain and, near the camera, courses."""
        tone = 1 + 0.13 * field(u, v)
        if stripe_m:
            fine = np.clip(stripe_m * scene.camera.focal_px / z - 1.5, 0, 1)
            tone *= 1 - 0.3 * fine * (np.mod(v, stripe_m) < 0.25 * stripe_m)
        return adjust_tone(albedo, tone), 0.0

    return material


def make_facade(scene: Scene, color: str, bay_m: float, floor_m: float, glass: float) -> Material:
    """Make a wall of windows.

    `glass` is the windows' share of each bay; some are lit when the palette has lamps.
    """
    base, seed = make_paint(scene, color), scene.uniform(0, 50)
    sky = rgb(scene.palette.horizon)

    def material(u: Array, v: Array, z: Array) -> tuple[Array, Array]:
        """Paint wall, ledges and panes."""
        wall, _ = base(u, v, z)

        # Bay and floor of each point, and where the point lies within them.
        column, row = np.floor(u / bay_m), np.floor(v / floor_m)
        in_u, in_v = np.abs(u / bay_m - column - 0.5) * 2, np.abs(v / floor_m - row - 0.45) * 2
        inside = (in_u < glass) & (in_v < 0.35 + 0.5 * glass) & (v > 0.4)

        # Far windows are finer than a pixel: blend them into the wall.
        far = np.clip(bay_m * scene.camera.focal_px / z / 4 - 0.5, 0, 1)
        pane = inside * far + glass * 0.6 * (1 - far)

        # A fixed random number for each window decides its shine and its lamp.
        chance = np.sin(column * 12.99 + row * 78.23 + seed) * 437.58
        chance = chance - np.floor(chance)
        shine = mix(adjust_tone(sky, 0.05 + 0.4 * chance**2), rgb("#ffcf7a"), chance > 1 - scene.light.lamps)

        # A dark ledge below each floor.
        ledge = 1 - 0.25 * far * (np.mod(v, floor_m) < 0.12 * floor_m)
        return adjust_tone(wall, ledge * (1 - pane)) + np.float32(0.02), adjust_tone(shine, pane)

    return material


def draw_face(scene: Scene, vertices: Array, material: Material, shadow: Shadow | None = None) -> None:
    """Draw one flat face if it looks towards the camera.

    Its first edge is its foot.
    """
    vertices = np.asarray(vertices, np.float32)

    # The outward normal; faces that look away are not drawn.
    edge, rise = vertices[1] - vertices[0], vertices[-1] - vertices[0]
    normal = compute_cross_product(rise, edge)
    normal /= np.linalg.norm(normal)
    eye = np.array([0, scene.camera.height_m, 0])
    if normal @ (eye - vertices[0]) <= 0:
        return
    edge = edge / np.linalg.norm(edge)
    across = compute_cross_product(edge, normal)

    # The same sun for the whole face, but for the shadows of others.
    cosine = float(normal @ scene.light.toward_sun)

    def paint(u: Array, v: Array, z: Array) -> Array:
        """Light the face's material."""
        albedo, emitted = material(u, v, z)
        sunlit = np.full(u.shape, max(cosine, 0.0), np.float32)
        height = vertices[0][1] + v * across[1]
        if shadow is not None and cosine > 0:
            x = vertices[0][0] + u * edge[0] + v * across[0]
            sunlit = sunlit * shadow(x, height, z)

        # Roofs and high walls see more of the sky.
        openness = 0.55 + 0.25 * normal[1] + 0.3 * np.clip(height / 25, 0, 1)
        return scene.light.shade(albedo, sunlit, openness) + emitted

    scene.canvas.draw_polygon(vertices, paint)


def draw_block(
    scene: Scene, centre: Array, size: tuple[float, float, float], turn: float, wall: Material, top: Material,
    shadow: Shadow | None = None,
) -> Array:  # fmt: skip
    """Draw a box on `centre`, turned about the vertical.

    `size` is (width, height, depth). Returns its corners `8 3`.
    """
    width, height, depth = size

    # The foot, turned about the vertical, and the roof above it.
    local = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, depth / 2]
    cos, sin = np.cos(turn), np.sin(turn)
    plan = local @ np.array([[cos, sin], [-sin, cos]])
    foot = centre + np.insert(plan, 1, 0, axis=1)
    roof = foot + [0, height, 0]

    # Four walls, then the roof.
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 0)):
        draw_face(scene, np.stack([foot[a], foot[b], roof[b], roof[a]]), wall, shadow)
    draw_face(scene, roof, top, shadow)
    return np.concatenate([foot, roof])


def draw_car(scene: Scene, centre: Array, shadow: Shadow | None = None) -> None:
    """Draw a car along the street, wheels on `centre`."""
    body = make_paint(scene, str(scene.rng.choice(CARS)))
    dark = make_paint(scene, "#15171a")
    draw_block(scene, centre, (1.6, 0.4, 3.4), 0, dark, dark, shadow)
    draw_block(scene, centre + [0, 0.3, 0], (1.8, 0.6, 4.3), 0, body, body, shadow)
    draw_block(
        scene, centre + [0, 0.9, 0], (1.5, 0.5, 2.2), 0, make_facade(scene, "#15171a", 1.1, 0.5, 0.8), body, shadow
    )
