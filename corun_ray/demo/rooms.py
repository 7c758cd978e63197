"""Rooms: walls, furniture and lamps, all of them boxes, seen from within."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from corun_ray.demo.canvas import compute_cross_product
from corun_ray.demo.light import adjust_tone, mix, ramp, rgb, stack_channels
from corun_ray.demo.noise import Array
from corun_ray.demo.scene import Scene

_WALLS = ("#e9e4d8", "#d9dfe3", "#cfd8c4", "#e6d3bd", "#b9c9d6", "#f1efe9", "#c9b49a", "#a8b7a4", "#d8b8a8")
_WOODS = ("#8a5a35", "#b98a58", "#5b3a26", "#c9a87c", "#74553c", "#d9c3a0")
_CLOTHS = ("#7a2f2b", "#2f4a6d", "#5d6b4a", "#8c8276", "#c2a15a", "#3b3b40", "#a65d4e", "#6a4c7a", "#d8d2c4", "#1f5f5b")
_BOOKS = ("#7d2a26", "#28456b", "#d9cfb8", "#3d5c3a", "#c58f3a", "#2b2b2e", "#8a6d9c", "#b9b2a4", "#5f7f94")
_LAMP = "#ffe0b0"
_DAYLIGHT = "#dfe9f7"

Point = Sequence[float] | Array
"""x to the right, y up, z into the room, in metres from the floor below the eye."""
Texture = Callable[[Array, Array], Array]
"""(u, v in metres on the surface, `H W`) -> reflectance `H W 3`."""


@dataclass(frozen=True)
class _Lamp:
    """A point of light: its place in the room, `3`, and its colour."""

    place: Array
    color: Array


@dataclass(frozen=True)
class _Room:
    """A room around the eye: its walls are upright, and turned by `turn` against the line of sight."""

    scene: Scene
    left_m: float
    right_m: float
    front_m: float
    back_m: float
    height_m: float
    turn: float
    lamps: tuple[_Lamp, ...]
    ambient: Array

    def place(self, points: Array) -> Array:
        """Turn points `N 3` of the room (x right, y up, z deep) to the world."""
        cos, sin = np.float32(np.cos(self.turn)), np.float32(np.sin(self.turn))
        x, y, z = points.T
        return np.stack([x * cos + z * sin, y, z * cos - x * sin], axis=1)

    def draw_face(self, corners: Sequence[Point], texture: Texture, glow: Array | None = None) -> None:
        """Draw a rectangle given by four corners `4 3` of the room.

        The second corner lies along u of the texture, the last along v. A face with a `glow` is a source of light.
        """
        vertices = self.place(np.asarray(corners, np.float32))
        along, up = vertices[1] - vertices[0], vertices[-1] - vertices[0]
        length_m, rise_m = (float(np.linalg.norm(side)) for side in (along, up))
        if min(length_m, rise_m) < 1e-3:
            return
        along, up = along / np.float32(length_m), up / np.float32(rise_m)

        # The side of the face that is turned to the eye.
        normal = compute_cross_product(along, up)
        eye = np.array([0, self.scene.camera.height_m, 0], np.float32)
        normal = normal if normal @ (eye - vertices[0]) > 0 else -normal

        def paint(u: Array, v: Array, z: Array) -> Array:
            if glow is not None:
                return texture(u, v) * glow

            # Corners are a little darker than the middle of a face.
            edge = np.minimum(np.minimum(u, length_m - u), np.minimum(v, rise_m - v))
            light = adjust_tone(self.ambient, 0.7 + 0.3 * ramp(edge, 0, 0.5))
            for lamp in self.lamps:
                (place,) = self.place(lamp.place[None])
                toward = [place[i] - vertices[0][i] - u * along[i] - v * up[i] for i in range(3)]
                distance = np.sqrt(sum(part * part for part in toward)) + np.float32(0.3)
                facing = np.maximum(sum(normal[i] * toward[i] for i in range(3)), 0) / distance
                light = light + adjust_tone(lamp.color, facing / (1 + 0.35 * distance**2))
            return texture(u, v) * light

        self.scene.canvas.draw_polygon(vertices, paint)

    def draw_box(self, low: Point, high: Point, texture: Texture) -> None:
        """Draw a box between two corners `3` of the room: its top and its four sides."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        self.draw_face([[x0, y1, z0], [x1, y1, z0], [x1, y1, z1], [x0, y1, z1]], texture)
        sides = ((x0, z0), (x1, z0)), ((x0, z1), (x1, z1)), ((x0, z0), (x0, z1)), ((x1, z0), (x1, z1))
        for (ax, az), (bx, bz) in sides:
            self.draw_face([[ax, y0, az], [bx, y0, bz], [bx, y1, bz], [ax, y1, az]], texture)


def draw_room(scene: Scene) -> None:
    """Draw a room with furniture along its walls, seen from one of its corners or sides."""
    room = _build_room(scene)
    _draw_shell(room)
    for side in range(3):
        _draw_wall_things(room, side)
    _draw_furniture(room)


def _build_room(scene: Scene) -> _Room:
    """Choose the room's size, its turn and its lamps."""
    left_m, right_m = scene.uniform(1.2, 3.4), scene.uniform(1.2, 3.4)
    back_m, height_m = scene.uniform(3.2, 8.5), scene.uniform(2.4, 3.1)
    # Turned further, the eye would see past the walls, which end behind it.
    turn = float(np.clip(scene.rng.normal(0, 0.35), -1, 1))

    # One lamp below the ceiling, and perhaps light that falls in from a window.
    lamps = [_Lamp(np.array([scene.uniform(-1, 1), height_m - 0.4, scene.uniform(1.2, back_m - 0.8)], np.float32),
                   rgb(_LAMP) * scene.uniform(1.0, 3.5))]  # fmt: skip
    if scene.rng.random() < 0.7:
        x = scene.rng.choice([-left_m + 0.3, right_m - 0.3])
        place = np.array([x, 1.6, scene.uniform(1.5, back_m - 0.5)], np.float32)
        lamps.append(_Lamp(place, rgb(_DAYLIGHT) * scene.uniform(1.5, 5)))

    daylight = np.float32(scene.uniform(0, 1))
    ambient = (1 - daylight) * rgb(_LAMP) + daylight * rgb(_DAYLIGHT)
    ambient = ambient * np.float32(scene.uniform(0.25, 0.55))
    return _Room(scene, -left_m, right_m, -1.5, back_m, height_m, turn, tuple(lamps), ambient)


def _draw_shell(room: _Room) -> None:
    """Draw floor, ceiling and walls."""
    scene, x0, x1, z0, z1, top = room.scene, room.left_m, room.right_m, room.front_m, room.back_m, room.height_m
    floor = _choose(scene, (_make_planks, _make_tiles, _make_carpet))
    room.draw_face([[x0, 0, z0], [x1, 0, z0], [x1, 0, z1], [x0, 0, z1]], floor)
    room.draw_face(
        [[x0, top, z0], [x1, top, z0], [x1, top, z1], [x0, top, z1]], _make_plaster(scene, "#f0eee8", papered=0)
    )

    wall = _make_plaster(scene, str(scene.rng.choice(_WALLS)))
    other = _make_plaster(scene, str(scene.rng.choice(_WALLS))) if scene.rng.random() < 0.3 else wall
    walls = ((x0, z0), (x0, z1), wall), ((x0, z1), (x1, z1), other), ((x1, z1), (x1, z0), wall)
    for (ax, az), (bx, bz), texture in walls:
        room.draw_face([[ax, 0, az], [bx, 0, bz], [bx, top, bz], [ax, top, az]], texture)


def _draw_wall_things(room: _Room, side: int) -> None:
    """Hang pictures, windows and doors on the left, back or right wall."""
    scene = room.scene
    start, end = (room.left_m, room.right_m) if side == 1 else (room.front_m + 2.2, room.back_m)
    at = start + scene.uniform(0.2, 0.8)
    while at < end - 0.5:
        kind = scene.rng.choice(["picture", "picture", "window", "door", "none"])
        widths_m = {"picture": scene.uniform(0.3, 1.1), "window": scene.uniform(0.8, 1.8), "door": 0.9, "none": 0.7}
        width_m = widths_m[kind]
        if kind != "none" and at + width_m < end - 0.1:
            _draw_wall_thing(room, side, str(kind), at, at + width_m)
        at += width_m + scene.uniform(0.2, 1.2)


def _draw_wall_thing(room: _Room, side: int, kind: str, start: float, end: float) -> None:
    """Draw one thing a little before its wall, between two places along it."""
    scene = room.scene
    low, high = {"picture": (1.2, 1.2 + scene.uniform(0.3, 0.9)), "window": (0.9, min(2.2, room.height_m - 0.2)),
                 "door": (0.0, 2.05)}[kind]  # fmt: skip

    def corner(along: float, y: float, before: float) -> list[float]:
        if side == 1:
            return [along, y, room.back_m - before]
        return [room.left_m + before if side == 0 else room.right_m - before, y, along]

    def rectangle(margin: float, before: float) -> list[list[float]]:
        a, b, c, d = start + margin, end - margin, low + (margin if low else 0), high - margin
        return [corner(a, c, before), corner(b, c, before), corner(b, d, before), corner(a, d, before)]

    frame = _make_plain(scene, str(scene.rng.choice((*_WOODS, "#f2f0ea", "#2c2a28"))))
    room.draw_face(rectangle(0, 0.01), frame)
    if kind == "picture":
        room.draw_face(rectangle(0.05, 0.02), _make_painting(scene))
    elif kind == "window":
        glow = rgb(_DAYLIGHT) * np.float32(scene.uniform(0.8, 3))
        room.draw_face(rectangle(0.07, 0.02), _make_painting(scene, pale=True), glow)


def _draw_furniture(room: _Room) -> None:
    """Stand furniture on the floor, most of it along the walls."""
    scene, rng = room.scene, room.scene.rng
    for _ in range(int(rng.integers(7, 17))):
        kind = rng.choice(["cabinet", "shelf", "sofa", "table", "box", "chair"])
        wide, deep, high = {
            "cabinet": (scene.uniform(0.5, 1.6), 0.5, scene.uniform(0.6, 2.0)),
            "shelf": (scene.uniform(0.6, 1.8), 0.35, scene.uniform(0.9, 2.1)),
            "sofa": (scene.uniform(1.2, 2.2), 0.9, 0.42),
            "table": (scene.uniform(0.7, 1.6), scene.uniform(0.5, 0.9), scene.uniform(0.45, 0.76)),
            "box": (scene.uniform(0.2, 0.6), scene.uniform(0.2, 0.6), scene.uniform(0.2, 0.7)),
            "chair": (0.45, 0.45, 0.46),
        }[kind]

        # Along the left, back or right wall, or free in the room.
        where = rng.choice(["left", "back", "right", "free"], p=[0.25, 0.3, 0.25, 0.2])
        if where in ("left", "right"):
            wide, deep = deep, wide
        anywhere = scene.uniform(room.left_m, room.right_m - wide)
        x = {"left": room.left_m, "right": room.right_m - wide}.get(where, anywhere)
        z = room.back_m - deep if where == "back" else scene.uniform(1.6, max(1.7, room.back_m - deep))
        _draw_piece(room, str(kind), np.array([x, 0, z]), np.array([x + wide, high, z + deep]))


def _draw_piece(room: _Room, kind: str, low: Array, high: Array) -> None:
    """Draw a piece of furniture that fills the box between two corners."""
    scene = room.scene
    wood, cloth = (_make_plain(scene, str(scene.rng.choice(colors))) for colors in (_WOODS, _CLOTHS))
    match kind:
        case "shelf":
            room.draw_box(low, high, _make_books(scene))
        case "sofa":
            room.draw_box(low, high, cloth)
            # The back stands along the longer side.
            back_low, back_high = low.copy(), high + [0, 0.42, 0]
            if high[0] - low[0] > high[2] - low[2]:
                back_low[2] = high[2] - 0.25
            else:
                back_high[0] = low[0] + 0.25
            room.draw_box(back_low, back_high, cloth)
        case "table" | "chair":
            room.draw_box([low[0], high[1] - 0.05, low[2]], high, wood)
            for x in (low[0], high[0] - 0.06):
                for z in (low[2], high[2] - 0.06):
                    room.draw_box([x, 0, z], [x + 0.06, high[1] - 0.05, z + 0.06], wood)
            if kind == "chair":
                room.draw_box([low[0], high[1], high[2] - 0.05], [high[0], high[1] + 0.45, high[2]], wood)
        case _:
            room.draw_box(low, high, cloth if kind == "box" else wood)

    # Something stands on top of many pieces.
    if kind in ("cabinet", "table", "shelf") and scene.rng.random() < 0.7:
        for _ in range(int(scene.rng.integers(1, 4))):
            side = scene.uniform(0.08, 0.25)
            x, z = scene.uniform(low[0], high[0] - side), scene.uniform(low[2], high[2] - min(side, high[2] - low[2]))
            thing = _make_plain(scene, str(scene.rng.choice((*_CLOTHS, *_BOOKS))))
            room.draw_box([x, high[1], z], [x + side, high[1] + scene.uniform(0.08, 0.5), z + side], thing)


# --- Textures ---


def _choose(scene: Scene, makers: tuple[Callable[[Scene], Texture], ...]) -> Texture:
    """Make one of several textures."""
    return makers[int(scene.rng.integers(len(makers)))](scene)


def _make_plain(scene: Scene, code: str) -> Texture:
    """Make a painted or woven surface: one colour, slightly uneven."""
    field, color, rough = scene.draw_field(1.5, "grain"), rgb(code), scene.uniform(0.02, 0.12)
    return lambda u, v: adjust_tone(color, np.clip(1 + np.float32(rough) * field(u, v), 0.4, 1.6))


def _make_plaster(scene: Scene, code: str, papered: float = 0.25) -> Texture:
    """Make a wall or ceiling: nearly even, or with the stripes of a wallpaper at a chance of `papered`."""
    field, color, stripes_m = scene.draw_field(6, "fractal"), rgb(code), scene.uniform(0.08, 0.3)
    strength = scene.uniform(0.05, 0.18) if scene.rng.random() < papered else 0.0

    def texture(u: Array, v: Array) -> Array:
        stripe = np.where((u / stripes_m) % 1 < 0.5, 1 + strength, 1 - strength)
        return adjust_tone(color, np.clip(stripe + 0.02 * field(u, v), 0.3, 1.4).astype(np.float32))

    return texture


def _make_planks(scene: Scene) -> Texture:
    """Make a floor of planks, each of its own tone."""
    grain, color, wide_m = scene.draw_field(2.5, "grain"), rgb(str(scene.rng.choice(_WOODS))), scene.uniform(0.08, 0.2)
    tones = scene.rng.uniform(0.75, 1.2, 64).astype(np.float32)

    def texture(u: Array, v: Array) -> Array:
        plank = np.floor(u / wide_m).astype(int) * 7 + np.floor(v / 1.3 + np.floor(u / wide_m) * 0.37).astype(int)
        gap = ramp(np.abs((u / wide_m) % 1 - 0.5), 0.5, 0.46)
        return adjust_tone(color, tones[plank % 64] * (0.55 + 0.45 * gap) * (1 + 0.1 * grain(u * 6, v)))

    return texture


def _make_tiles(scene: Scene) -> Texture:
    """Make a floor of tiles in one or two colours."""
    wide_m, tint = scene.uniform(0.2, 0.5), rgb(str(scene.rng.choice(_WALLS)))
    second = tint if scene.rng.random() < 0.6 else rgb(str(scene.rng.choice(_CLOTHS)))

    def texture(u: Array, v: Array) -> Array:
        odd = (np.floor(u / wide_m) + np.floor(v / wide_m)) % 2
        within = np.abs((u / wide_m) % 1 - 0.5) < 0.48
        within &= np.abs((v / wide_m) % 1 - 0.5) < 0.48
        return mix(tint, second, odd.astype(np.float32)) * stack_channels(np.where(within, 1, 0.6))

    return texture


def _make_carpet(scene: Scene) -> Texture:
    """Make a carpet of two mottled colours."""
    field, fine = scene.draw_field(8, "fractal"), scene.draw_field(0.6, "grain")
    first, second = (rgb(str(code)) for code in scene.rng.choice(_CLOTHS, 2))
    return lambda u, v: adjust_tone(mix(first, second, ramp(field(u, v), -0.5, 0.5)), 1 + 0.15 * fine(u, v))


def _make_painting(scene: Scene, pale: bool = False) -> Texture:
    """Make a picture of soft shapes in three colours; a pale one is a view through a window."""
    codes = ("#cfe0f2", "#f4f6f8", "#a9c29a") if pale else scene.rng.choice((*_CLOTHS, *_BOOKS, *_WALLS), 3)
    first, second, third = (rgb(str(code)) for code in codes)
    one, two = scene.draw_field(scene.uniform(0.6, 3), "fractal"), scene.draw_field(scene.uniform(0.4, 2), "fractal")
    return lambda u, v: mix(mix(first, second, ramp(one(u, v), -0.2, 0.2)), third, ramp(two(u, v), 0.2, 0.6))


def _make_books(scene: Scene) -> Texture:
    """Make shelves full of books: boards, and backs of several colours between them."""
    colors = np.stack([rgb(str(code)) for code in scene.rng.choice(_BOOKS, 64)]).astype(np.float32)
    heights = scene.rng.uniform(0.6, 0.95, 64).astype(np.float32)
    board, shelf_m, book_m = rgb(str(scene.rng.choice(_WOODS))), scene.uniform(0.28, 0.4), scene.uniform(0.025, 0.06)

    def texture(u: Array, v: Array) -> Array:
        level, book = np.floor(v / shelf_m).astype(int), np.floor(u / book_m).astype(int)
        index = (book * 31 + level * 17) % 64
        within = v / shelf_m - level
        back = colors[index] * stack_channels(0.7 + 0.3 * ramp(np.abs((u / book_m) % 1 - 0.5), 0.5, 0.3))
        empty = np.broadcast_to(board * np.float32(0.25), back.shape)
        filled = np.where((within < heights[index])[..., None], back, empty)
        return np.where((within > 0.93)[..., None], board, filled).astype(np.float32)

    return texture
