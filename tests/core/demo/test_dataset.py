"""The demo dataset as files: what is written, that it repeats, and what it refuses."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from corun_ray.core.demo import DemoSize, write_demo

SMALL = DemoSize(clear_images=7, hazy_images=6, width_px=96, height_px=72)


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
             ("clear", "depth", "hazy", "hazy_truth")}  # fmt: skip
    assert names["clear"] == names["depth"] and len(names["clear"]) == 7
    assert names["hazy"] == names["hazy_truth"] and len(names["hazy"]) == 6
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
        assert np.median(depth[-4:]) > 10 * np.median(depth[:4]), (
            "the bottom rows are nearer than the top ones"
        )
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
        assert hazy.min(axis=2).mean() > truth.min(axis=2).mean() + 10, (
            f"{path.name}: haze raises the dark channel"
        )
        correlation = np.corrcoef(hazy[36:].mean(axis=2).ravel(), truth[36:].mean(axis=2).ravel())[0, 1]
        assert correlation > 0.1, f"{path.name}: nothing of the near half shows through"
    assert min(psnr_db) > 4 and max(psnr_db) < 24
    assert 8 < np.mean(psnr_db) < 16


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", seed=3, size=SMALL)
    assert _hashes(tmp_path / "again") == _hashes(demo)
    write_demo(tmp_path / "other", seed=4, size=DemoSize(2, 1, 96, 72))
    other = _hashes(tmp_path / "other")
    assert all(other[name] != digest for name, digest in _hashes(demo).items() if name in other)


def test_a_complete_demo_is_left_as_it_is(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    write_demo(demo, seed=3, size=SMALL, progress=lambda done, total: pytest.fail("drew something"))
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


def test_an_interrupted_demo_is_completed(demo: Path, tmp_path: Path) -> None:
    calls = []

    def stop_at_four(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", seed=3, size=SMALL, progress=stop_at_four)
    write_demo(
        tmp_path / "demo", seed=3, size=SMALL, progress=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 13) for done in range(1, 14)]
    assert _hashes(tmp_path / "demo") == _hashes(demo)


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
