"""The demo dataset as files: what is written, that it repeats, and what it refuses."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from corun_ray.demo.dataset import DemoSize, write_demo

SMALL = DemoSize(clear_images=7, hazy_images=6, width_px=96, height_px=72)
TINY = DemoSize(clear_images=2, hazy_images=1, width_px=64, height_px=48)


def _hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, path
    return image


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    write_demo(root, seed=3, size=SMALL)
    return root


def test_folders_hold_pairs_of_the_same_names_and_size(demo: Path) -> None:
    names = {folder: [path.stem for path in sorted((demo / folder).iterdir())] for folder in
             ("clear", "depth", "hazy", "hazy_truth", "hazy_transmission")}  # fmt: skip
    assert names["clear"] == names["depth"] and len(names["clear"]) == 7
    assert names["hazy"] == names["hazy_truth"] == names["hazy_transmission"] and len(names["hazy"]) == 6
    assert not set(names["clear"]) & set(names["hazy"])
    for path in (demo / "clear").iterdir():
        assert _read(path).shape == (72, 96, 3)
    for path in (demo / "depth").iterdir():
        depth = _read(path)
        assert depth.shape == (72, 96) and depth.dtype == np.uint16


def test_depth_is_large_near_and_zero_in_the_sky(demo: Path) -> None:
    manifest = json.loads((demo / "demo.json").read_text())
    for path in (demo / "depth").iterdir():
        depth = _read(path)
        assert depth.max() == 65535
        assert depth[-2:].min() > 0, f"{path.name}: no sky at the bottom"
        assert np.median(depth[-4:]) > np.median(depth[:4]), f"{path.name}: the bottom is nearer than the top"
        assert manifest["images"][path.stem]["near_m"] > 1
    skies = [(_read(path)[0] == 0).mean() for path in (demo / "depth").iterdir()]
    assert np.mean(skies) > 0.5


def test_clear_images_are_contrasty_with_dark_regions_and_colour(demo: Path) -> None:
    for path in (demo / "clear").iterdir():
        image = _read(path).astype(float) / 255
        assert image.mean(axis=2).std() > 0.08, path.name
        assert np.percentile(image.min(axis=2), 5) < 0.25, path.name
        assert 0.15 < image.mean() < 0.75, path.name


def test_haze_hides_but_does_not_erase(demo: Path) -> None:
    psnr_db = []
    for path in (demo / "hazy").iterdir():
        hazy, truth = _read(path).astype(float), _read(demo / "hazy_truth" / path.name).astype(float)
        psnr_db.append(10 * np.log10(255**2 / np.mean((hazy - truth) ** 2)))
        assert hazy.min(axis=2).mean() > truth.min(axis=2).mean() + 10, f"{path.name}: haze raises the dark channel"
        edges = [np.diff(image[36:].mean(axis=2), axis=1).ravel() for image in (hazy, truth)]
        assert np.corrcoef(*edges)[0, 1] > 0.2, f"{path.name}: nothing of the near half shows through"
    assert min(psnr_db) > 4 and max(psnr_db) < 24
    assert 8 < np.mean(psnr_db) < 16


def test_the_transmission_tells_where_haze_hides(demo: Path) -> None:
    for path in (demo / "hazy_transmission").iterdir():
        transmission = _read(path)
        assert transmission.shape == (72, 96) and transmission.dtype == np.uint16
        assert transmission.min() < transmission.max() and transmission.max() > 20000

        # Haze takes contrast, and thick haze takes more of it.
        thin = transmission[:, 1:] > np.median(transmission)
        hazy, truth = (
            np.abs(np.diff(_read(demo / folder / path.name).astype(float).mean(axis=2), axis=1))
            for folder in ("hazy", "hazy_truth")
        )
        kept = {where: hazy[mask].sum() / truth[mask].sum() for where, mask in (("thin", thin), ("thick", ~thin))}
        assert kept["thick"] < kept["thin"], path.name


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        write_demo(tmp_path / name, seed=seed, size=TINY)
    one, again, other = (_hashes(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again
    assert one.keys() == other.keys() and len(one) == 8
    assert all(one[name] != other[name] for name in one)


def test_a_complete_demo_is_left_as_it_is(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    write_demo(demo, seed=3, size=SMALL, progress=lambda done, total: pytest.fail("drew something"))
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_an_interrupted_demo_is_completed(tmp_path: Path) -> None:
    calls = []

    def stop_at_two(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    write_demo(tmp_path / "whole", size=TINY)
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", size=TINY, progress=stop_at_two)
    write_demo(tmp_path / "demo", size=TINY, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert _hashes(tmp_path / "demo") == _hashes(tmp_path / "whole")


def test_a_demo_stopped_before_its_first_image_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("corun_ray.demo.dataset._draw", stop)
        write_demo(tmp_path, size=DemoSize(1, 0, 64, 48))
    write_demo(tmp_path, size=DemoSize(1, 0, 64, 48))
    assert len(list((tmp_path / "clear").iterdir())) == 1


def test_a_foreign_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty and no demo dataset"):
        write_demo(tmp_path, size=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_of_another_seed_or_size_is_refused(demo: Path) -> None:
    with pytest.raises(FileExistsError, match="seed 3"):
        write_demo(demo, seed=5, size=SMALL)
    with pytest.raises(FileExistsError, match="another demo"):
        write_demo(demo, seed=3, size=DemoSize(8, 6, 96, 72))
