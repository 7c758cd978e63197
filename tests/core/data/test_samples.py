from typing import Any

import cv2
import numpy as np
import pytest

from corun_ray.core.data import augment
from corun_ray.core.data.depth import DepthMap, draw_procedural_depth
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.images import BadImage, decode_image
from corun_ray.core.data.samples import compute_real_side_px, crop_pair, make_real_views, make_synthetic_pair
from tests.conftest import photograph

HAZE = HazeRange()


def scene(height_px: int = 90, width_px: int = 130) -> np.ndarray:
    """Red counts columns, green counts rows, blue is texture."""
    rgb = np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    rgb[..., 0] = np.arange(width_px)
    rgb[..., 1] = np.arange(height_px)[:, None]
    return rgb


def as_it_is(inverse_depth: np.ndarray) -> DepthMap:
    """A map in [0, 1] that nothing is scaled by."""
    return DepthMap(inverse_depth, "inverse", np.float32(0), np.float32(1))


def sample(seed: int, *, image: np.ndarray | None = None, depth: np.ndarray | None = None, **options):
    rng = np.random.default_rng(seed)
    image = scene() if image is None else image
    depth_map = draw_procedural_depth(rng, *image.shape[:2]) if depth is None else as_it_is(depth)
    defaults: dict[str, Any] = {"patch_px": 48, "haze_range": HAZE, "random_resize": True}
    return make_synthetic_pair(image, depth_map, rng, **(defaults | options))


def same_bytes(first, second) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.parametrize("random_resize", [False, True])
@pytest.mark.parametrize("size_px", [(90, 130), (130, 90), (48, 48), (30, 70)])
def test_pairs_have_the_patch_size(size_px, random_resize):
    for seed in range(8):
        pair = sample(seed, image=scene(*size_px), random_resize=random_resize)
        for patch in (pair.hazy, pair.clear):
            assert patch.shape == (48, 48, 3) and patch.dtype == np.uint8 and patch.flags.c_contiguous


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others():
    assert same_bytes(sample(1), sample(1))
    assert not same_bytes(sample(1), sample(2))


def test_the_source_is_left_as_it_was():
    image, depth = scene(), draw_procedural_depth(np.random.default_rng(0), 90, 130).pixels
    image_before, depth_before = image.copy(), depth.copy()
    for seed in range(10):
        sample(seed, image=image, depth=depth)
    np.testing.assert_array_equal(image, image_before)
    np.testing.assert_array_equal(depth, depth_before)


def test_the_transmission_is_that_of_the_haze_and_leaves_the_pair_as_it_is(monkeypatch):
    """Over black, under white airlight and without a camera's faults, the hazy patch is `1 - T`."""
    white = HazeRange(airlight=(1.0, 1.0), airlight_tint=0.0)
    options = {"image": np.zeros((90, 130, 3), np.uint8), "haze_range": white, "rotation": True}
    options["camera_faults"] = augment.CAMERA_FAULTS["none"]
    for seed in range(8):
        pair, plain = sample(seed, **options, with_transmission=True), sample(seed, **options)
        assert plain.transmission is None and np.array_equal(plain.hazy, pair.hazy)
        assert pair.transmission.shape == (48, 48) and pair.transmission.std() > 5
        assert np.abs(255 - pair.hazy[..., 0].astype(int) - pair.transmission).max() <= 1


def test_a_camera_without_faults_takes_what_is_there_and_a_mild_one_little_less(monkeypatch):
    no_haze = HazeRange(beta=(1e-9, 1e-9))
    errors = {}
    for kind, faults in augment.CAMERA_FAULTS.items():
        pairs = [sample(seed, haze_range=no_haze, camera_faults=faults) for seed in range(40)]
        errors[kind] = np.mean([np.abs(pair.hazy.astype(int) - pair.clear).mean() for pair in pairs])
    assert errors["none"] == 0
    assert 0 < errors["mild"] < errors["published"] / 4


@pytest.mark.parametrize("random_resize", [False, True])
def test_without_degradation_the_hazy_patch_is_the_scattering_model_of_the_clear_one(monkeypatch, random_resize):
    """Depth is the red channel, so the clear patch itself tells what its transmission must be."""
    monkeypatch.setattr(augment, "degrade", lambda rng, rgb, camera: augment.darken(rgb, 1.0))
    monkeypatch.setattr(augment, "sample_jpeg_quality", lambda *_: None)
    image = scene(90, 256)
    image[..., 2] = 40
    fixed = HazeRange(beta=(0.7, 0.7), airlight=(0.8, 0.8), airlight_tint=0.0)
    flips = set()
    for seed in range(20):
        pair = sample(
            seed,
            image=image,
            depth=image[..., 0] / np.float32(255),
            haze_range=fixed,
            random_resize=random_resize,
        )
        clear = pair.clear / 255
        transmission = np.exp(-2 * 0.7 * (1 - clear[..., :1]))
        expected = clear * transmission + 0.8 * (1 - transmission)
        np.testing.assert_allclose(pair.hazy / 255, expected, atol=1.6 / 255)
        flips.add(bool(pair.clear[0, 0, 0] > pair.clear[0, -1, 0]))
    assert flips == {False, True}


def test_uneven_haze_is_that_of_its_true_transmission(monkeypatch):
    monkeypatch.setattr(augment, "degrade", lambda rng, rgb, camera: augment.darken(rgb, 1.0))
    monkeypatch.setattr(augment, "sample_jpeg_quality", lambda *_: None)
    uneven = HazeRange(beta=(0.7, 0.7), airlight=(0.8, 0.8), airlight_tint=0.0, density_variation=(0.8, 0.8))
    flat = np.zeros((90, 130), np.float32)
    flat[0, 0] = 1
    spreads = []
    for seed in range(10):
        pair = sample(seed, depth=flat, haze_range=uneven, random_resize=False, with_transmission=True)
        transmission = pair.transmission[..., None] / 255
        expected = pair.clear / 255 * transmission + 0.8 * (1 - transmission)
        np.testing.assert_allclose(pair.hazy / 255, expected, atol=1.6 / 255)
        spreads.append(np.ptp(transmission))

    # Over a wall of one depth, the transmission of uniform haze would be one number.
    assert np.median(spreads) > 0.1


def test_the_clear_patch_is_never_degraded():
    for seed in range(20):
        pair = sample(seed, random_resize=False)
        row, column = int(pair.clear[0, 0, 1]), int(pair.clear[0, :, 0].min())
        region = scene()[row : row + 48, column : column + 48]
        assert np.array_equal(pair.clear, region) or np.array_equal(pair.clear, region[:, ::-1])


def test_half_of_the_hazy_patches_went_through_jpeg(monkeypatch):
    drawn = []
    round_trip = augment.apply_jpeg
    monkeypatch.setattr(augment, "apply_jpeg", lambda *a, **k: drawn.append(a[1]) or round_trip(*a, **k))
    qualities = [sample(seed).jpeg_quality for seed in range(300)]
    compressed = [quality for quality in qualities if quality is not None]
    assert 120 < len(compressed) < 180
    assert drawn == compressed


def test_jpeg_is_told_where_the_region_lies(monkeypatch):
    places = []
    monkeypatch.setattr(augment, "apply_jpeg", lambda rgb, quality, **where: places.append(where) or rgb)
    monkeypatch.setattr(augment, "sample_jpeg_quality", lambda *_: 50)
    monkeypatch.setattr(augment, "sample_crop", lambda *a, **k: augment.Crop(5, 11, 48, flip=False))
    sample(0)
    assert places == [{"top_px": 5, "left_px": 11}]


def test_jpeg_changes_the_hazy_patch(monkeypatch):
    monkeypatch.setattr(augment, "sample_jpeg_quality", lambda *_: None)
    plain = sample(5)
    monkeypatch.setattr(augment, "sample_jpeg_quality", lambda *_: 30)
    compressed = sample(5)
    np.testing.assert_array_equal(plain.clear, compressed.clear)
    assert (plain.hazy != compressed.hazy).any()


def test_only_the_kept_region_is_worked_on(monkeypatch):
    worked_on = []
    degrade = augment.degrade
    monkeypatch.setattr(augment, "degrade", lambda rng, rgb, c: worked_on.append(rgb.shape[:2]) or degrade(rng, rgb, c))
    sample(0, image=scene(250, 256), random_resize=False)
    assert {width_px for _, width_px in worked_on} == {48} and sum(height_px for height_px, _ in worked_on) == 48


def test_noise_is_the_cameras_so_shrinking_softens_it(monkeypatch):
    monkeypatch.setattr(augment, "sample_jpeg_quality", lambda *_: None)
    monkeypatch.setattr(augment, "sample_noise", lambda *_: np.eye(3, dtype=np.float32) * 0.1)
    crop = {"side_px": 48}
    monkeypatch.setattr(augment, "sample_crop", lambda *a, **k: augment.Crop(0, 0, crop["side_px"], False))
    image, depth = np.full((200, 200, 3), 128, np.uint8), np.ones((200, 200), np.float32)
    seed = next(s for s in range(20) if sample(s, image=image, depth=depth).hazy.std() > 8)
    native = sample(seed, image=image, depth=depth).hazy.std()
    crop["side_px"] = 192
    assert sample(seed, image=image, depth=depth).hazy.std() == pytest.approx(native / 4, rel=0.1)


def test_depth_of_another_resolution_is_resized_and_of_another_frame_refused():
    ramp = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (180, 1))
    fine, coarse = (
        sample(3, image=scene(90, 128), depth=ramp),
        sample(3, image=scene(90, 128), depth=ramp[::4, ::4]),
    )
    np.testing.assert_array_equal(fine.clear, coarse.clear)
    assert np.abs(fine.hazy.astype(int) - coarse.hazy).mean() < 2
    with pytest.raises(BadImage, match="128 x 90 px does not fit its image of 130 x 130 px"):
        sample(0, image=scene(130, 130), depth=np.zeros((90, 128), np.float32))


def test_rotation_turns_both_patches_alike_and_changes_nothing_else(monkeypatch):
    monkeypatch.setattr(augment, "degrade", lambda rng, rgb, camera: augment.darken(rgb, 1.0))
    monkeypatch.setattr(augment, "sample_jpeg_quality", lambda *_: None)
    no_haze = HazeRange(beta=(1e-9, 1e-9))
    turns = set()
    for seed in range(20):
        depth = np.full((90, 130), 0.5, np.float32)
        plain = sample(seed, depth=depth, haze_range=no_haze)
        turned = sample(seed, depth=depth, haze_range=no_haze, rotation=True)
        np.testing.assert_array_equal(turned.hazy, turned.clear)
        turns.add(next(n for n in range(4) if np.array_equal(turned.clear, np.rot90(plain.clear, n))))
    assert turns == {0, 1, 2, 3}


class Opened:
    """An image that gives regions alone, as a file does that is decoded only where it is asked for."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape = pixels, pixels.shape

    def __getitem__(self, region: tuple[slice, slice]) -> np.ndarray:
        rows, columns = region
        assert 0 <= rows.start < rows.stop <= self.shape[0] and 0 <= columns.start < columns.stop <= self.shape[1]
        return self.pixels[region]


def paired(seed: int, hazy: np.ndarray, clear: np.ndarray, **options):
    defaults: dict[str, Any] = {"patch_px": 48, "random_resize": True, "rotation": True}
    return crop_pair(hazy, clear, np.random.default_rng(seed), **(defaults | options))


@pytest.mark.parametrize("size_px", [(90, 130), (48, 48), (30, 70)])
def test_paired_patches_show_the_same_place(size_px):
    clear = scene(*size_px)
    for seed in range(12):
        pair = paired(seed, 255 - clear, clear)
        assert pair.clear.shape == pair.hazy.shape == (48, 48, 3) and pair.hazy.flags.c_contiguous
        assert np.abs(255 - pair.clear.astype(int) - pair.hazy).max() <= 1  # resizing rounds
        assert pair.jpeg_quality is None
    pairs = [paired(seed, 255 - clear, clear) for seed in (1, 1, 2)]
    assert same_bytes(pairs[0], pairs[1]) and not same_bytes(pairs[0], pairs[2])


def test_nothing_is_added_to_a_paired_patch():
    """Every patch is a piece of its source, flipped or turned: no degradation, no JPEG."""
    clear = scene()
    seen = set()
    for seed in range(40):
        pair = paired(seed, clear // 2, clear, random_resize=False)
        row, column = int(pair.clear[..., 1].min()), int(pair.clear[..., 0].min())
        region = clear[row : row + 48, column : column + 48]
        places = [np.rot90(view, turns) for view in (region, region[:, ::-1]) for turns in range(4)]
        seen.add(next(i for i, place in enumerate(places) if np.array_equal(place, pair.clear)))
        np.testing.assert_array_equal(pair.hazy, pair.clear // 2)
    assert seen == set(range(8))


@pytest.mark.parametrize(("height_px", "width_px"), [(90, 128), (92, 120), (150, 200), (90, 200)])
def test_a_pair_of_two_sizes_is_refused(height_px, width_px):
    """A truth that is smaller on one side, or so much larger that it has another scale, is none even of a centre."""
    mismatch = f"^degraded image of 130 x 90 px does not fit its clean one of {width_px} x {height_px} px$"
    for crop_truth in (False, True):
        with pytest.raises(BadImage, match=mismatch):
            paired(0, scene(90, 130), scene(height_px, width_px), crop_truth=crop_truth)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("border_px", [(0, 0), (10, 8), (5, 0), (1, 7)])
def test_a_truth_loses_its_border(border_px, as_file):
    whole = photograph(np.random.default_rng(1), 90 + border_px[0], 130 + border_px[1])
    top, left = border_px[0] // 2, border_px[1] // 2
    view = whole[top : top + 90, left : left + 130]
    truth = Opened(whole) if as_file else whole
    for seed in range(4):
        expected, pair = paired(seed, 255 - view, view), paired(seed, 255 - view, truth, crop_truth=True)
        assert same_bytes(pair, expected)
    if any(border_px):
        with pytest.raises(BadImage, match=r"px \(crop_truth: true takes the centre of the clean one\)$"):
            paired(0, view, truth)


@pytest.mark.parametrize("size_px", [(90, 130), (300, 60), (20, 20), (48, 48)])
def test_real_views_show_the_whole_image_at_the_patch_size(size_px):
    image = np.zeros((*size_px, 3), np.uint8)
    image[: size_px[0] // 2] = 100
    views = make_real_views(image, np.random.default_rng(0), patch_px=48, jpeg_quality=None)
    for view in (views.weak, views.strong):
        assert view.shape == (48, 48, 3) and view.dtype == np.uint8
    assert (views.weak[:22] == 100).all() and (views.weak[26:] == 0).all()


def test_the_weak_view_is_the_same_every_time_and_the_strong_one_is_not():
    views = [make_real_views(scene(), np.random.default_rng(seed), patch_px=48, jpeg_quality=60) for seed in range(4)]
    assert all(np.array_equal(view.weak, views[0].weak) for view in views)
    assert len({view.strong.tobytes() for view in views}) > 1
    again = make_real_views(scene(), np.random.default_rng(0), patch_px=48, jpeg_quality=60)
    assert same_bytes(again, views[0])


def test_the_strong_view_starts_from_the_compressed_weak_view(monkeypatch):
    monkeypatch.setattr(augment, "make_strong_view", lambda rng, rgb: rgb // 2)
    compressed = make_real_views(scene(), np.random.default_rng(0), patch_px=48, jpeg_quality=40)
    whole = augment.apply_jpeg(scene(), 40)
    np.testing.assert_array_equal(compressed.weak, augment.resize(whole, 48, 48))
    np.testing.assert_array_equal(compressed.strong, compressed.weak // 2)


def test_cubic_resizing_aliases_as_published_and_area_does_not():
    image = photograph(np.random.default_rng(0), 400, 600)
    cubic = make_real_views(image, np.random.default_rng(0), patch_px=96, jpeg_quality=None, resize="cubic").weak
    np.testing.assert_array_equal(cubic, cv2.resize(image, (96, 96), interpolation=cv2.INTER_CUBIC))
    area = make_real_views(image, np.random.default_rng(0), patch_px=96, jpeg_quality=None).weak
    detail = [cv2.Laplacian(patch.astype(np.float32), -1).std() for patch in (cubic, area)]
    assert detail[0] > 1.2 * detail[1]
    # Single pixels count, so the image must be decoded whole.
    assert compute_real_side_px(96, "cubic") is None


def test_jpeg_of_a_photograph_leaves_no_grid_on_its_patch():
    """Steps between pixels, at the borders of 8 px blocks against elsewhere, as a mean over eight photographs."""

    def blockiness(patches):
        steps = np.abs(np.diff(np.array(patches, float), axis=2)).mean((0, 1, 3))
        at_border = np.arange(len(steps)) % 8 == 7
        return steps[at_border].mean() / steps[~at_border].mean()

    photographs = [photograph(np.random.default_rng(number), 400, 600) for number in range(8)]
    views = [make_real_views(image, np.random.default_rng(0), patch_px=288, jpeg_quality=30) for image in photographs]
    assert blockiness([view.weak for view in views]) == pytest.approx(1, abs=0.05)
    patches = [augment.resize(image, 288, 288) for image in photographs]
    assert blockiness([augment.apply_jpeg(patch, 30) for patch in patches]) > 1.2


@pytest.mark.parametrize("short_px", [260, 460, 520, 920, 1030])
def test_real_images_decoded_small_are_no_softer(short_px):
    """Short sides of 4 to 16 patches: wherever one falls between two scales of the decoder, detail is kept."""
    rng, patch_px, long_px = np.random.default_rng(1), 64, short_px * 4 // 3
    octaves = [
        cv2.resize(rng.normal(size=(-(-short_px // n), -(-long_px // n), 3)), (long_px, short_px)) * n
        for n in (1, 2, 4, 8, 16, 32, 64)
    ]
    photograph = np.clip(128 + 0.5 * sum(octaves), 0, 255).astype(np.uint8)
    data = cv2.imencode(".jpg", photograph, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    whole = augment.resize(decode_image(data), patch_px, patch_px)
    small = augment.resize(decode_image(data, compute_real_side_px(patch_px)), patch_px, patch_px)
    detail = [cv2.Laplacian(patch, cv2.CV_32F).std() for patch in (whole, small)]
    assert detail[1] == pytest.approx(detail[0], rel=0.08)
