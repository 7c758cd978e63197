"""The camera, the picture with its depth buffer, and the primitives drawn into it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.demo.noise import Array

NEAR_CLIP_M = 0.3
Paint = Callable[[Array, Array, Array], Array]
"""(u, v, z in metres, arrays `H W`) -> linear colour `H W 3`; u along the first edge, v across it."""


@dataclass(frozen=True)
class Viewpoint:
    """A level pinhole camera at (0, height_m, 0) that looks along +z; y is up, x to the right.

    The horizon may lie off the centre row (a shift lens), so that verticals stay vertical.
    """

    width_px: int
    height_px: int
    focal_px: float
    horizon_px: float
    height_m: float

    @cached_property
    def slope_x(self) -> Array:
        """Return x / z of every column, shape `1 W`."""
        columns = np.arange(self.width_px, dtype=np.float32)[None]
        return (columns + np.float32(0.5 - self.width_px / 2)) / np.float32(self.focal_px)

    @cached_property
    def slope_y(self) -> Array:
        """Return (y - height_m) / z of every row.

        Shape `H 1`; positive above the horizon.
        """
        rows = np.arange(self.height_px, dtype=np.float32)[:, None]
        return (np.float32(self.horizon_px - 0.5) - rows) / np.float32(self.focal_px)

    @cached_property
    def path_per_depth(self) -> Array:
        """Return the line of sight's length per metre of z.

        Shape `H W`.
        """
        return np.sqrt(1 + self.slope_x**2 + self.slope_y**2)

    def project(self, points: Array) -> Array:
        """Project world points `N 3` to pixel coordinates `N 2`.

        Pixel centres lie at .5.
        """
        z = points[:, 2]
        pixels = np.empty((len(points), 2), np.float32)
        pixels[:, 0] = self.width_px / 2 + self.focal_px * points[:, 0] / z
        pixels[:, 1] = self.horizon_px - self.focal_px * (points[:, 1] - self.height_m) / z
        return pixels


Cutout = Callable[[tuple[slice, slice]], tuple[Array, Array]]
"""The rows and columns of a cut-out that are within the picture -> linear colour `h w 3` and alpha `h w`."""


class Canvas:
    """Linear light `color` (`H W 3`) and distance along the optical axis `z` (`H W`, metres, sky = inf)."""

    def __init__(self, camera: Viewpoint, sky: Array) -> None:
        self.camera = camera
        self.color = sky
        self.z = np.full(sky.shape[:2], np.inf, np.float32)

    def draw_polygon(self, vertices: Array, paint: Paint) -> None:
        """Draw a convex planar polygon.

        `vertices` are `N 3` world points; `paint` takes the polygon's own plane coordinates.
        """
        camera, vertices = self.camera, np.asarray(vertices, np.float32)

        # The polygon's plane: its first edge, its normal, and its distance from the eye.
        edge = _normalise(vertices[1] - vertices[0])
        normal = _normalise(compute_cross_product(edge, vertices[-1] - vertices[0]))
        offset = normal @ (vertices[0] - np.array([0, camera.height_m, 0], np.float32))

        # Drop the part behind the eye; a plane through the eye is seen from its edge.
        clipped = vertices if vertices[:, 2].min() >= NEAR_CLIP_M else _clip_near(vertices)
        if len(clipped) < 3 or abs(offset) < 1e-6:
            return

        # Stop early where the polygon is outside or hidden.
        pixels = camera.project(clipped)
        box = self._clip_box(pixels.min(0), pixels.max(0))
        if box is None or not (self.z[box] > clipped[:, 2].min()).any():
            return

        # The exact distance of every pixel of the box on the plane.
        facing = normal[0] * camera.slope_x[:, box[1]] + normal[1] * camera.slope_y[box[0]] + normal[2]
        with np.errstate(divide="ignore"):
            z = np.clip(offset / facing, clipped[:, 2].min(), clipped[:, 2].max())

        # Narrow the box to the pixels that are seen.
        mask = _fill_polygon(pixels, *box) & (z < self.z[box])
        part = _find_bounds(mask)
        if part is None:
            return
        z, mask = z[part], mask[part]
        rows = slice(box[0].start + part[0].start, box[0].start + part[0].stop)
        columns = slice(box[1].start + part[1].start, box[1].start + part[1].stop)

        # Plane coordinates of the seen pixels, for the paint.
        x = camera.slope_x[:, columns] * z - vertices[0][0]
        y = camera.slope_y[rows] * z + np.float32(camera.height_m) - vertices[0][1]
        across = compute_cross_product(normal, edge)
        u, v = (axis[0] * x + axis[1] * y + axis[2] * (z - vertices[0][2]) for axis in (edge, across))
        self.put(rows, columns, mask, z, paint(u, v, z))

    def draw_sprite(self, foot: Array, size_px: tuple[int, int], paint: Cutout) -> None:
        """Stand a flat cut-out on the world point `foot`.

        `size_px` is (width, height). Nothing is drawn where it is hidden or outside.
        """
        # Where the cut-out lies in the picture; stop early where it is outside or hidden.
        column, row = self.camera.project(foot[None])[0]
        left, top = round(column - size_px[0] / 2), round(row - size_px[1])
        corner = np.array([left, top])
        box = self._clip_box(corner, corner + size_px - 1)
        if box is None or not (self.z[box][::2, ::2] > foot[2]).any():
            return
        rows, columns = box

        # Paint only the part within the picture.
        color, alpha = paint(np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left])
        self.put(rows, columns, alpha > 0.5, np.full(alpha.shape, foot[2], np.float32), color)

    def draw_line(self, points: Array, width_px: int, color: Array) -> None:
        """Draw a polyline, each piece at its own distance.

        `points` are `N 3` world points.
        """
        pixels = self.camera.project(points)
        for start, end, z in zip(pixels[:-1], pixels[1:], (points[1:, 2] + points[:-1, 2]) / 2, strict=True):
            box = self._clip_box(np.minimum(start, end) - width_px, np.maximum(start, end) + width_px)
            if box is None:
                continue
            rows, columns = box

            # Draw the piece into a small mask, at the mean distance of its ends.
            mask = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
            corner = np.array([columns.start, rows.start])
            ends = [tuple(int(c) for c in np.floor(p - corner)) for p in (start, end)]
            cv2.line(mask, ends[0], ends[1], 1, width_px)
            self.put(rows, columns, mask > 0, np.full(mask.shape, z, np.float32), color)

    def darken(self, outlines: list[Array], factor: float) -> None:
        """Dim, once, the ground in horizontal polygons.

        `outlines` are `N 3` each; things seen past the polygons stay as they are.
        """
        shaded = np.zeros(self.z.shape, bool)
        for outline in outlines:
            # Pixels within the outline that lie at the distance of its plane.
            below_m = self.camera.height_m - float(outline[0, 1])
            pixels = self.camera.project(outline)
            box = self._clip_box(pixels.min(0), pixels.max(0)) if outline[:, 2].min() > NEAR_CLIP_M else None
            if box is not None and below_m > 0:
                plane_z = below_m / np.maximum(-self.camera.slope_y[box[0]], 1e-4)
                shaded[box] |= _fill_polygon(pixels, *box) & (np.abs(self.z[box] - plane_z) < 0.12 * plane_z)
        part = _find_bounds(shaded)
        if part is not None:
            self.color[part][shaded[part]] *= np.float32(factor)

    def put(self, rows: slice, columns: slice, mask: NDArray[np.bool_], z: Array, color: Array) -> None:
        """Write `color` where `mask` holds and nothing is nearer.

        `color` is broadcast to `h w 3`.
        """
        mask = mask & (z < self.z[rows, columns])
        self.z[rows, columns][mask] = z[mask]
        self.color[rows, columns][mask] = np.broadcast_to(color, (*mask.shape, 3))[mask]

    def _clip_box(self, low: Array, high: Array) -> tuple[slice, slice] | None:
        """Clip a pixel box to the picture.

        Returns rows and columns, None if the box meets none.
        """
        left, top = (max(0, int(np.floor(c))) for c in low)
        right = min(self.camera.width_px, int(np.ceil(high[0])) + 1)
        bottom = min(self.camera.height_px, int(np.ceil(high[1])) + 1)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def compute_cross_product(a: Array, b: Array) -> Array:
    """Compute the cross product of two vectors.

    NumPy's own is slow for single ones.
    """
    (ax, ay, az), (bx, by, bz) = a, b
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], np.float32)


def _normalise(vector: Array) -> Array:
    """Scale a vector to unit length."""
    return vector / np.linalg.norm(vector)


def _fill_polygon(pixels: Array, rows: slice, columns: slice) -> NDArray[np.bool_]:
    """Return the convex polygon's pixels within the box."""
    inside = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
    corners = (pixels - [columns.start + 0.5, rows.start + 0.5]) * 16
    cv2.fillConvexPoly(inside, np.clip(corners, -3e5, 3e5).astype(np.int32), 1, shift=4)
    return inside.astype(bool)


def _find_bounds(mask: NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """Find the smallest rows and columns that hold `mask`.

    None if it is empty.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if len(rows) else None


def _clip_near(vertices: Array) -> Array:
    """Return a polygon's part in front of the near plane."""
    kept = []
    for a, b in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        if a[2] >= NEAR_CLIP_M:
            kept.append(a)
        if (a[2] >= NEAR_CLIP_M) != (b[2] >= NEAR_CLIP_M):
            kept.append(a + (b - a) * (NEAR_CLIP_M - a[2]) / (b[2] - a[2]))
    return np.array(kept)
