import os
from pathlib import Path

import cv2
import pytest
import torch
from torch import Tensor

from corun_ray.core.metrics.fade import compute_distances, fade
from tests import DATA

ALL_IMAGES = os.environ.get("CORUN_FADE_IMAGES")


def read_scores(table: Path) -> dict[str, float]:
    rows = (line.split("\t") for line in table.read_text().splitlines())
    return {name: float(score) for name, score, *_ in rows}


def read_image(path: Path) -> Tensor:
    pixels = cv2.imread(str(path))
    assert pixels is not None, path
    return torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(("name", "official"), read_scores(DATA / "fade" / "official.tsv").items())
def test_agrees_with_the_authors_program(name: str, official: float) -> None:
    assert fade(read_image(DATA / "fade" / name)).item() == pytest.approx(official, rel=0.01)


@pytest.mark.skipif(ALL_IMAGES is None, reason="CORUN_FADE_IMAGES names no folder with fade_official.tsv")
def test_agrees_with_the_authors_program_on_every_image() -> None:
    """The folder holds ``fade_official.tsv`` and, anywhere below it or beside it, the images it names."""
    table = next(Path(str(ALL_IMAGES)).rglob("fade_official.tsv"))
    scores = read_scores(table)
    paths = {path.name: path for path in Path(str(ALL_IMAGES)).rglob("*") if path.name in scores}
    assert paths.keys() == scores.keys()
    found = {name: fade(read_image(path)).item() for name, path in paths.items()}
    assert found == pytest.approx(scores, rel=0.01)


@pytest.fixture
def photo() -> Tensor:
    return read_image(DATA / "fade" / "gfn_marble.png")[..., 200:264, 100:196]


def test_batch_equals_single_images(photo: Tensor) -> None:
    images = torch.cat([photo, photo.flip(-1), 0.5 + photo / 2])
    singles = torch.cat([fade(image[None]) for image in images])
    torch.testing.assert_close(fade(images), singles)


def test_more_haze_scores_higher(photo: Tensor) -> None:
    scores = [fade(photo * t + 0.9 * (1 - t)).item() for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert scores == sorted(scores)


def test_distances_find_the_hazy_half(photo: Tensor) -> None:
    half_hazy = photo.clone()
    half_hazy[..., 48:] = photo[..., 48:] * 0.3 + 0.63
    to_clear, to_foggy = compute_distances(half_hazy)
    assert to_clear.shape == to_foggy.shape == (1, 8, 12)
    density = to_clear / (to_foggy + 1)
    assert density[..., 6:].nanmean() > 2 * density[..., :6].nanmean()


def test_sides_are_cropped_to_whole_patches(photo: Tensor) -> None:
    torch.testing.assert_close(fade(photo[..., :61, :90]), fade(photo[..., :56, :88]))


def test_float64_input_gives_the_same(photo: Tensor) -> None:
    torch.testing.assert_close(fade(photo.double()), fade(photo))


def test_black_image_is_undefined() -> None:
    assert fade(torch.zeros(1, 3, 16, 16)).isnan()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 8, 32)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected RGB images B 3 H W"):
        fade(torch.zeros(shape))
