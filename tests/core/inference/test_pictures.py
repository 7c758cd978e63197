"""Pictures for people."""

import numpy as np
import pytest
import torch

from corun_ray.core.inference.pictures import (
    BACKGROUND,
    ERROR_GAIN,
    GAP_PX,
    HEADING_PX,
    apply_colour_map,
    build_stage_rows,
    draw_grid,
)
from corun_ray.core.networks.corun import Restoration


def plain(height_px: int, width_px: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height_px, width_px, 3), colour, np.uint8)


def box(canvas: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the pixels of a colour, which must fill a rectangle."""
    rows, columns = np.nonzero((canvas == colour).all(2))
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert len(rows) == height * width
    return int(rows.min()), int(columns.min()), int(height), int(width)


def test_colour_map_goes_from_dark_violet_to_yellow() -> None:
    picture = apply_colour_map(np.array([[-1.0, 0.0, 0.25], [0.75, 1.0, 2.0]]))
    assert picture.shape == (2, 3, 3) and picture.dtype == np.uint8
    red, green, blue = picture[0, 1].astype(int)
    assert blue > red > green and max(red, green, blue) < 100
    red, green, blue = picture[1, 1].astype(int)
    assert red > 220 and green > 220 and blue < 100
    np.testing.assert_array_equal(picture[0, 0], picture[0, 1])
    np.testing.assert_array_equal(picture[1, 2], picture[1, 1])
    brightness = [int(picture[place].sum()) for place in ((0, 1), (0, 2), (1, 0), (1, 1))]
    assert brightness == sorted(brightness)


def test_a_grid_places_every_picture_in_its_cell() -> None:
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    canvas = draw_grid(
        [
            {"hazy": plain(20, 40, red), "scene": plain(80, 40, green)},  # wide, tall
            {"hazy": None, "scene": plain(10, 40, blue)},
        ],
        cell_px=40,
    )
    assert canvas.dtype == np.uint8
    assert canvas.shape == (HEADING_PX + 40 + GAP_PX + 10 + GAP_PX, GAP_PX + 2 * (40 + GAP_PX), 3)
    second_column = GAP_PX + 40 + GAP_PX
    assert box(canvas, red) == (HEADING_PX, GAP_PX, 20, 40)
    assert box(canvas, green) == (HEADING_PX, second_column + 10, 40, 20)  # in the middle of its cell
    assert box(canvas, blue) == (HEADING_PX + 40 + GAP_PX, second_column, 10, 40)
    assert (canvas[HEADING_PX + 40 :, : GAP_PX + 40] == BACKGROUND).all(), "the empty cell"


def test_columns_have_their_names_above_them() -> None:
    canvas = draw_grid([{"a": plain(30, 30, (0, 0, 0)), "": plain(30, 30, (0, 0, 0))}], cell_px=30)
    heading = canvas[:HEADING_PX]
    assert heading[:, : GAP_PX + 30].min() < 150
    assert (heading[:, GAP_PX + 30 + GAP_PX :] == BACKGROUND).all()


def test_pictures_are_enlarged_and_reduced_to_the_cell() -> None:
    small, large = plain(4, 8, (200, 0, 0)), plain(300, 600, (0, 200, 0))
    canvas = draw_grid([{"small": small, "large": large}], cell_px=60)
    assert box(canvas, (200, 0, 0))[2:] == box(canvas, (0, 200, 0))[2:] == (30, 60)


def test_rows_have_their_labels_to_the_left() -> None:
    red, green = (200, 0, 0), (0, 200, 0)
    rows = [{"scene": plain(30, 30, red)}, {"scene": plain(30, 30, green)}]
    bare, labelled = draw_grid(rows, cell_px=30), draw_grid(rows, cell_px=30, labels=["hazy", "2"])
    margin = labelled.shape[1] - bare.shape[1]
    assert margin > 20 and labelled.shape[0] == bare.shape[0]
    np.testing.assert_array_equal(labelled[:, margin + GAP_PX :], bare[:, GAP_PX:])
    for top in (HEADING_PX, HEADING_PX + 30 + GAP_PX):
        assert labelled[top : top + 30, :margin].min() < 150
    assert (labelled[:HEADING_PX, :margin] == BACKGROUND).all()
    with pytest.raises(ValueError):
        draw_grid(rows, labels=["only one"])


def test_a_stage_shows_what_it_explains_and_what_not() -> None:
    hazy = torch.full((1, 3, 16, 20), 0.8)
    hazy[..., 10:] = 0.7
    stage = Restoration(torch.full((1, 3, 16, 20), 0.5), torch.full((1, 1, 16, 20), 0.4))  # 0.5 * 0.4 + 0.6 = 0.8
    rows = build_stage_rows([stage, Restoration(hazy, None)], hazy)
    assert list(rows) == ["hazy", "1", "2"]
    np.testing.assert_array_equal(rows["hazy"]["scene"][0, [0, -1], 0], [204, 178])
    assert {name for name, picture in rows["1"].items() if picture is None} == set()
    assert (rows["1"]["scene"] == 128).all() and (rows["1"]["re-hazed"] == 204).all()
    np.testing.assert_array_equal(rows["1"]["transmission"], apply_colour_map(np.full((16, 20), 0.4)))
    error = np.where(np.arange(20) < 10, 0, 0.1 * ERROR_GAIN) * np.ones((16, 1))
    np.testing.assert_allclose(rows["1"][f"error x{ERROR_GAIN}"], apply_colour_map(error), atol=3)
    for row in (rows["hazy"], rows["2"]):
        assert [name for name, picture in row.items() if picture is not None] == ["scene"]
    assert draw_grid(list(rows.values()), 40, list(rows)).shape[0] == HEADING_PX + 3 * (32 + GAP_PX)
