"""Trees: a herbarium of cut-outs with surface normals, grown once, lit and sized where they stand."""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from corun_ray.demo.canvas import Canvas
from corun_ray.demo.light import Light, Palette, mix, rgb
from corun_ray.demo.noise import Array

TreeKind = Literal["conifer", "broadleaf", "poplar", "bare", "bush"]

_HEIGHT_PX = 288
_BARK, _SNOW = rgb("#57483a"), rgb("#e8eef4")
_PER_KIND = 5
# Channels of a cut-out: normal to the right, normal upward, openness to the sky, and what covers the pixel.
_NX = 0
_LEAF, _WOOD = 0.5, 1.0


@dataclass(frozen=True)
class Tree:
    kind: TreeKind
    foot: Array
    height_m: float


class Herbarium:
    """The tree cut-outs all scenes of a dataset share."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Grow the cut-outs, some of each kind."""
        self._grown: dict[TreeKind, list[list[Array]]] = {
            "conifer": [_halve_repeatedly(_grow_conifer(rng)) for _ in range(_PER_KIND)],
            "broadleaf": [_halve_repeatedly(_grow_leafy(rng, 0.9, 0.3)) for _ in range(_PER_KIND)],
            "poplar": [_halve_repeatedly(_grow_leafy(rng, 0.3, 0.12)) for _ in range(_PER_KIND)],
            "bare": [_halve_repeatedly(_grow_bare(rng)) for _ in range(_PER_KIND)],
            "bush": [_halve_repeatedly(_grow_leafy(rng, 1.5, 0.0)) for _ in range(_PER_KIND)],
        }

    def draw(
        self,
        canvas: Canvas,
        tree: Tree,
        light: Light,
        palette: Palette,
        sunlit: float,
        rng: np.random.Generator,
    ) -> None:
        """Draw one tree.

        `sunlit` is 0 where the tree stands in the shade … 1.
        """
        # Choose a cut-out of the kind; in winter some trees are bare.
        leafless = tree.kind in ("broadleaf", "poplar") and rng.random() < palette.bare_trees
        kind = "bare" if leafless else tree.kind
        sizes = self._grown[kind][rng.integers(_PER_KIND)]

        # Choose the coarsest size that need not be enlarged.
        height_px = max(1, round(tree.height_m * canvas.camera.focal_px / float(tree.foot[2])))
        grown = next((size for size in reversed(sizes) if size.shape[0] > height_px), sizes[0])
        size_px = max(1, round(height_px * grown.shape[1] / grown.shape[0])), height_px

        # Each tree has a colour of its own.
        leaf = rgb(palette.conifer if kind == "conifer" else str(rng.choice(palette.leaves)))
        leaf = leaf * (rng.uniform(0.75, 1.3) * rng.uniform(0.9, 1.1, 3)).astype(np.float32)
        mirrored = rng.random() < 0.5
        snow = 0.0 if kind == "bare" else palette.snow

        def paint(part: tuple[slice, slice]) -> tuple[Array, Array]:
            """Size, perhaps mirror, and light the cut-out."""
            shrinking = height_px < grown.shape[0]
            image = cv2.resize(grown, size_px, interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
            if mirrored:
                image = cv2.flip(image, 1)
                image[..., _NX] *= -1
            return _light_cutout(image[part], light, leaf, snow, sunlit)

        canvas.draw_sprite(tree.foot, size_px, paint)


def _light_cutout(tree: Array, light: Light, leaf: Array, snow: float, sunlit: float) -> tuple[Array, Array]:
    """Light a cut-out.

    Returns linear colour `h w 3` and alpha `h w`.
    """
    # Channels of the cut-out.
    nx, ny, openness, cover = (np.ascontiguousarray(tree[..., i]) for i in range(4))
    alpha, wood = np.clip(2 * cover, 0, 1), np.clip(2 * cover - 1, 0, 1)

    # Leaves or bark, with snow on what looks up.
    albedo = mix(leaf, _BARK, wood)
    if snow:
        albedo = mix(albedo, _SNOW, np.clip((ny + openness - 0.9) * 2.2, 0, 0.9) * np.float32(snow))

    # Sunlight by the normal.
    sun = light.toward_sun
    facing = nx * sun[0] + ny * sun[1] - np.sqrt(np.maximum(1 - nx**2 - ny**2, 0)) * sun[2]
    # Leaves let light through: no side of a crown is as dark as an opaque ball's back.
    facing = (0.75 * np.maximum(facing, 0) + 0.25) * openness * np.float32(sunlit)
    return light.shade(albedo, facing, openness), alpha


def _halve_repeatedly(tree: Array) -> list[Array]:
    """Return the cut-out and coarser ones of it.

    Dropping every second pixel keeps its grain.
    """
    sizes = [tree]
    while sizes[-1].shape[0] > 40:
        sizes.append(np.ascontiguousarray(sizes[-1][::2, ::2]))
    return sizes


def _make_grid(width_px: int) -> tuple[Array, Array]:
    """Make x in [-1, 1] and y in [0, 1].

    x goes across; y is 0 at the foot and 1 at the top.
    """
    x = np.linspace(-1, 1, width_px, dtype=np.float32)[None]
    y = np.linspace(1, 0, _HEIGHT_PX, dtype=np.float32)[:, None]
    return np.broadcast_to(x, (_HEIGHT_PX, width_px)), np.broadcast_to(y, (_HEIGHT_PX, width_px))


def _draw_grain(rng: np.random.Generator, shape: tuple[int, int], sizes_px: tuple[int, ...]) -> Array:
    """Draw noise with features of the given sizes.

    About unit deviation.
    """
    total = np.zeros(shape, np.float32)
    for size in sizes_px:
        lattice = rng.standard_normal((shape[0] // size + 2, shape[1] // size + 2), dtype=np.float32)
        total += cv2.resize(lattice, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return total / np.float32(np.sqrt(len(sizes_px)))


def _grow_conifer(rng: np.random.Generator) -> Array:
    """Grow a conifer: tiers that droop around a trunk."""
    x, y = _make_grid(120)

    # Tiers of drooping branches.
    tiers = rng.uniform(9, 15)
    droop = 0.35 * np.abs(x)
    phase = (y + droop * 0.25) * tiers + 0.35 * _draw_grain(rng, x.shape, (24,))
    tier = phase - np.floor(phase)

    # The outline narrows to the top and with each tier.
    crown = np.clip((1 - y) / (1 - rng.uniform(0.04, 0.1)), 0, 1)
    outline = crown ** rng.uniform(0.75, 1.0) * (0.5 + 0.42 * (1 - tier))
    ragged = outline * (1 + 0.16 * _draw_grain(rng, x.shape, (4, 9)))
    leafy = (np.abs(x) < ragged) & (y > rng.uniform(0.05, 0.1))
    trunk = (np.abs(x) < 0.035 + 0.02 * (1 - y)) & (y < 0.5)

    # Normals of a cone with tiers; the lower side of each tier sees less of the sky.
    nx = np.clip(x / np.maximum(outline, 0.05), -1, 1) * 0.8
    ny = 0.25 + 0.5 * (tier - 0.4)
    fine = _draw_grain(rng, x.shape, (2, 4, 8))
    open_sky = np.clip(0.42 + 0.6 * tier * np.clip(np.abs(nx) + 0.45, 0, 1) + 0.16 * fine, 0.1, 1.15)
    return np.dstack([nx, ny, open_sky, np.where(leafy, _LEAF, _WOOD * trunk)]).astype(np.float32)


def _grow_leafy(rng: np.random.Generator, aspect: float, trunk_share: float) -> Array:
    """Grow a crown of leaf clusters.

    Each cluster is a lit ball; they are painted from the back of the crown to its front.
    """
    width_px = int(_HEIGHT_PX * aspect)
    x, y = _make_grid(width_px)

    # The trunk first: clusters are painted over it.
    wobble = _draw_grain(rng, x.shape, (3, 6)), _draw_grain(rng, x.shape, (3, 6))
    tree = np.zeros((*x.shape, 4), np.float32)
    stem = np.abs(x + 0.03 * np.sin(9 * y)) < (0.05 + 0.05 * (0.5 - y).clip(0)) / aspect * 0.7
    tree[stem & (y < 0.6) & (trunk_share > 0)] = (0, 0.1, 0.6, _WOOD)
    centre, radius_y = (1 + trunk_share) / 2, (1 - trunk_share) / 2
    clusters = 40
    for front in np.sort(rng.uniform(-1, 1, clusters)):
        # A cluster's place in the crown, its size and the pixels around it.
        angle, reach = (
            rng.uniform(0, 2 * np.pi),
            np.sqrt(rng.uniform(0, 1)) * 0.8 * np.sqrt(1 - 0.6 * front**2),
        )
        cx, cy = reach * np.cos(angle), centre + radius_y * reach * np.sin(angle)
        radius = rng.uniform(0.17, 0.33)
        box = _find_box(x, y, cx, cy, radius, radius * radius_y)

        # Coordinates within the ball, with a ragged edge.
        dx = (x[box] - cx) / radius + 0.16 * wobble[0][box]
        dy = (y[box] - cy) / (radius * radius_y) + 0.16 * wobble[1][box]

        # Clusters at the top and in front see more of the sky.
        height = (cy - centre) / radius_y
        openness = np.clip(0.62 + 0.22 * (height + front + dy) + 0.13 * wobble[0][box], 0.12, 1.15)
        bright = [0.65 * dx + 0.3 * cx, 0.65 * dy + 0.3 * height, openness, np.full_like(dx, _LEAF)]
        ball = dx**2 + dy**2 < 1
        tree[box][ball] = np.dstack(bright)[ball]
    tree[..., :2] = np.clip(tree[..., :2], -1, 1) * np.float32(0.85)
    return tree


def _find_box(x: Array, y: Array, cx: float, cy: float, half_width: float, half_height: float) -> tuple[slice, slice]:
    """Find the grid's rows and columns around a ball.

    With room for its ragged edge.
    """
    columns = np.flatnonzero(np.abs(x[0] - cx) < half_width * 1.4)
    rows = np.flatnonzero(np.abs(y[:, 0] - cy) < half_height * 1.4)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _grow_bare(rng: np.random.Generator) -> Array:
    """Grow a branching skeleton.

    Twigs thin out towards the crown's edge.
    """
    width_px = int(_HEIGHT_PX * 0.8)
    wood = np.zeros((_HEIGHT_PX, width_px), np.uint8)
    tips = [(width_px / 2, float(_HEIGHT_PX), np.pi / 2, _HEIGHT_PX * 0.21, 8.0)]
    while tips:
        x, y, angle, length, thick = tips.pop()

        # Draw a branch, then let it fork until twigs are short.
        end = x + length * np.cos(angle), y - length * np.sin(angle)
        cv2.line(wood, (int(x), int(y)), (int(end[0]), int(end[1])), 1, max(1, round(thick)))
        if length < 7:
            continue
        for turn in rng.uniform(0.12, 0.66, 2) * (1, -1):
            bend = 0.06 * (np.pi / 2 - angle)
            tips.append((*end, angle + turn + bend, length * rng.uniform(0.68, 0.88), thick * 0.68))

    # Branches count as round and open to the sky.
    across, _ = _make_grid(width_px)
    openness = np.clip(0.75 + 0.15 * _draw_grain(rng, wood.shape, (2, 5)), 0.3, 1)
    nx, ny = 0.4 * np.sign(across), np.full_like(across, 0.15)
    return np.dstack([nx, ny, openness, _WOOD * wood]).astype(np.float32)
