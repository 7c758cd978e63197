"""Which pictures of a validation are kept: the chosen images, the best and the worst, whatever the order."""

import itertools

import numpy as np
import pytest

from corun_ray.core.data.images import decode_image
from corun_ray.service.runs.held_out import MeasuredImage
from corun_ray.service.train.validation import PICTURE_PX, Gallery

VALUES = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}


@pytest.mark.parametrize("order", itertools.permutations(VALUES))
def test_the_chosen_the_best_and_the_worst_are_kept(order):
    gallery = Gallery({"c"})
    picture = np.full((10, 12, 3), 90, np.uint8)
    for image in order:
        gallery.add(MeasuredImage("val", image, {"fade": VALUES[image]}), lambda: (picture, picture))
    found = gallery.list_measured()
    assert [one.image for one in found] == list(order)
    assert {one.image for one in found if one.pictures is not None} == {"b", "c", "d"}


def test_pictures_are_small_and_only_made_when_kept():
    looked = []

    def look():
        looked.append(1)
        return np.full((2000, 1000, 3), 50, np.uint8), np.full((2000, 1000, 3), 200, np.uint8)

    gallery = Gallery(set())
    for value in (2.0, 1.0, 3.0, 2.5, 1.5, 2.2):
        gallery.add(MeasuredImage("val", str(value), {"fade": value}), look)
    assert len(looked) == 3
    (best,) = [one for one in gallery.list_measured() if one.image == "3.0"]
    assert decode_image(best.pictures.output).shape == (PICTURE_PX, PICTURE_PX // 2, 3)
    assert decode_image(best.pictures.output).mean() > decode_image(best.pictures.hazy).mean() + 100


def test_an_undefined_value_is_neither_best_nor_worst():
    gallery, picture = Gallery(set()), np.zeros((10, 12, 3), np.uint8)
    for image, value in {"black": float("nan"), "a": 1.0, "b": 2.0}.items():
        gallery.add(MeasuredImage("val", image, {"fade": value}), lambda: (picture, picture))
    assert [one.image for one in gallery.list_measured() if one.pictures is not None] == ["a", "b"]
