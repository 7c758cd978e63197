"""Rooms: closed on all sides, with depth, each unlike the others."""

import cv2
import numpy as np
import pytest

from corun_ray.demo.dataset import ROOM, DemoSize, draw_scene, write_demo
from corun_ray.demo.light import PALETTES
from corun_ray.demo.noise import Noise
from corun_ray.demo.plants import Herbarium
from corun_ray.demo.scene import Scene


@pytest.fixture(scope="module")
def rooms() -> list[Scene]:
    rng = np.random.default_rng(0)
    noise, herbarium = Noise(rng), Herbarium(rng)
    return [draw_scene(ROOM, PALETTES[0], (96, 72), noise, herbarium, np.random.default_rng(i)) for i in range(8)]


def test_a_room_has_walls_all_around_and_no_sky(rooms: list[Scene]) -> None:
    for room in rooms:
        assert np.isfinite(room.canvas.z).all(), "a ray leaves the room"
        assert 0.3 <= room.canvas.z.min() < 4 and 3 < room.canvas.z.max() < 15


def test_rooms_are_lit_textured_and_unlike_each_other(rooms: list[Scene]) -> None:
    pictures = [room.canvas.color for room in rooms]
    for picture in pictures:
        assert (picture >= 0).all() and 0.02 < picture.mean() < 3 and picture.std() > 0.03
    means = np.array([picture.mean((0, 1)) / picture.mean() for picture in pictures])
    assert means.std(0).max() > 0.02, "walls and lamps differ in colour"


def test_rooms_are_added_to_the_clear_images_and_leave_the_others_as_they_are(tmp_path) -> None:
    plain = DemoSize(clear_images=1, hazy_images=1, width_px=64, height_px=48)
    write_demo(tmp_path / "plain", size=plain)
    write_demo(tmp_path / "more", size=DemoSize(1, 1, 64, 48, room_images=2))
    names = {path.name for path in (tmp_path / "more" / "clear").iterdir()}
    assert {"room_000_room_dawn.jpg", "room_001_room_dawn.jpg"} < names and len(names) == 3
    for path in (tmp_path / "plain").rglob("*.*g"):
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(tmp_path / "plain")).read_bytes()
    depth = cv2.imread(str(tmp_path / "more" / "depth" / "room_000_room_dawn.png"), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16 and depth.min() > 0 and depth.max() == 65535
