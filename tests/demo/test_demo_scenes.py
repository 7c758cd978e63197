"""The drawing itself: perspective, occlusion and exact distances."""

import numpy as np
import pytest

from corun_ray.demo.canvas import Canvas, Paint, Viewpoint
from corun_ray.demo.dataset import KINDS, draw_scene
from corun_ray.demo.film import reduce_nearest_z
from corun_ray.demo.haze import Fog
from corun_ray.demo.light import PALETTES, Light
from corun_ray.demo.noise import Array, Noise
from corun_ray.demo.plants import Herbarium
from corun_ray.demo.scene import Scene
from corun_ray.demo.terrain import cast_rays

CAMERA = Viewpoint(width_px=80, height_px=60, focal_px=70.0, horizon_px=25.0, height_m=5.0)
RED, BLUE = np.array([1, 0, 0], np.float32), np.array([0, 0, 1], np.float32)


def _canvas() -> Canvas:
    return Canvas(CAMERA, np.zeros((60, 80, 3), np.float32))


def _solid(color: Array) -> Paint:
    return lambda u, v, z: np.broadcast_to(color, (*z.shape, 3))


def _wall(z: float) -> np.ndarray:
    return np.array([[-2, 2, z], [2, 2, z], [2, 8, z], [-2, 8, z]])


@pytest.fixture(scope="module")
def noise() -> Noise:
    return Noise(np.random.default_rng(0))


@pytest.fixture(scope="module")
def herbarium() -> Herbarium:
    return Herbarium(np.random.default_rng(1))


def _draw(kind: str, noise: Noise, herbarium: Herbarium, palette: int = 1) -> Scene:
    return draw_scene(KINDS[kind], PALETTES[palette], (96, 72), noise, herbarium, np.random.default_rng(5))


def test_a_ground_polygon_has_the_distance_of_its_plane() -> None:
    canvas = _canvas()
    ground = np.array([[-500, 0, 1], [500, 0, 1], [500, 0, 4000], [-500, 0, 4000]])
    canvas.draw_polygon(ground, _solid(RED))
    row = 45
    assert np.allclose(canvas.z[row], 5.0 * 70.0 / (row + 0.5 - 25.0), rtol=1e-4)
    assert np.isinf(canvas.z[:24]).all()


@pytest.mark.parametrize("order", [(10.0, 20.0), (20.0, 10.0)])
def test_what_is_nearer_hides_what_is_behind_in_any_order(order: tuple[float, float]) -> None:
    canvas = _canvas()
    for z in order:
        canvas.draw_polygon(_wall(z), _solid(RED if z == 10 else BLUE))
    assert canvas.z[25, 40] == pytest.approx(10, rel=1e-5)
    assert (canvas.color[25, 40] == RED).all()


def test_a_polygon_that_reaches_behind_the_camera_is_clipped() -> None:
    canvas = _canvas()
    wall = np.array([[3, 0, -20], [3, 0, 60], [3, 9, 60], [3, 9, -20]])
    canvas.draw_polygon(wall, _solid(RED))
    column = 70
    assert np.allclose(canvas.z[25, column], 3 * 70.0 / (column + 0.5 - 40), rtol=1e-4)
    assert np.isinf(canvas.z[25, :40]).all()


def test_terrain_meets_the_line_of_sight_on_its_surface() -> None:
    light = Light.draw(PALETTES[1], np.random.default_rng(0))

    def hill(x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return 0.05 * z - 2 + 0.02 * x

    ground = cast_rays(CAMERA, light, lambda x, z: (hill(x, z), np.zeros_like(x)), 4, 1000)
    # The outermost columns repeat their neighbours' relief.
    seen = ground.seen & (ground.z < 900) & (np.abs(CAMERA.slope_x) < 0.55)
    assert seen.mean() > 0.5
    assert np.abs(ground.y - hill(ground.x, ground.z))[seen].max() < 0.005
    assert np.allclose(ground.steep[seen], np.hypot(0.05, 0.02), atol=2e-3)


def test_a_ridge_casts_its_shadow_away_from_the_sun() -> None:
    light = Light(np.array([0.8, 0.6, 0.0], np.float32), RED, BLUE, lamps=0.0)

    def ridge(x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return 12 * np.exp(-((x / 2) ** 2)).astype(np.float32)

    high = Viewpoint(80, 60, 70.0, -10.0, 30.0)
    ground = cast_rays(high, light, lambda x, z: (ridge(x, z), np.zeros_like(x)), 20, 400)
    sunny, shady = (ground.sunlit[np.abs(ground.x - x) < 1] for x in (7, -7))
    assert len(shady) > 20 and sunny.min() > 0.5 and shady.mean() < 0.1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_fills_the_picture(kind: str, noise: Noise, herbarium: Herbarium) -> None:
    for palette in range(len(PALETTES)):
        scene = _draw(kind, noise, herbarium, palette)
        color, z = scene.canvas.color, scene.canvas.z
        assert np.isfinite(color).all() and color.min() >= 0
        assert (color.max(axis=2) > 0).mean() > 0.999, "no holes"
        assert np.isfinite(z[-2:]).all() and np.isinf(z).any(), "ground below, sky above"
        assert z.min() > 1
        assert color[np.isfinite(z)].std() > 0.02


def test_reduce_nearest_z_keeps_thin_near_things() -> None:
    z = np.full((4, 4), np.inf, np.float32)
    z[1, 2] = 7
    assert (reduce_nearest_z(z) == np.array([[np.inf, 7], [np.inf, np.inf]], np.float32)).all()


def test_fog_thickens_with_distance_and_thins_with_height(noise: Noise, herbarium: Herbarium) -> None:
    scene = _draw("alpine", noise, herbarium)
    fog = Fog(1 / 500, scale_height_m=80, patchiness=0.0, sun_tint=0.2, brightness=0.8, hue="#e2e5e8")
    transmission = fog.compute_transmission(scene)
    assert transmission.min() > 0 and transmission.max() <= 1
    z = scene.canvas.z
    below = np.broadcast_to(scene.camera.slope_y < 0, z.shape)
    near, far = transmission[below & (z < 60)].mean(), transmission[below & (z > 200) & (z < 2000)].mean()
    assert near > far + 0.1
    sky = np.isinf(z[:, 0])
    assert transmission[0, 0] > transmission[np.flatnonzero(sky)[-1], 0], "the zenith is clearer than the horizon"
