"""Which file belongs to which, by stem and by a pattern."""

import unicodedata

import pytest

from corun_ray.config.pairing import compile_pattern
from corun_ray.service.data.pairing import find_key, pair_by_pattern, pair_by_stem

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Île_dé.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("path", "pattern", "key"),
    [
        ("0001_0.8_0.04.jpg", None, "0001_0.8_0.04"),
        ("0001_0.8_0.04.jpg", "^([^_]+)", "0001"),
        ("0001.png", "^([^_]+)", "0001"),
        ("day/0001_0.8.jpg", "^([^_]+)", "day/0001"),
        ("part1/0001_0.8.jpg", r"^(?:part\d/)?([^_/]+)", "0001"),
        ("a/b/0001_0.8.jpg", r"(\w+)/[^/]+$", "b"),
        ("33_GT.png", r"^(\d+)_hazy$", None),
        ("_GT.png", "^([^_]*)", None),
        ("hazy-33-b.png", "^(hazy|clear)-(?P<key>[0-9]+)", "33"),
        (DECOMPOSED, "^([^_]+)", unicodedata.normalize("NFC", "Île")),
        (COMPOSED, unicodedata.normalize("NFD", "^(Île)"), unicodedata.normalize("NFC", "Île")),
    ],
)
def test_the_key_of_a_file(path, pattern, key):
    assert find_key(path, pattern and compile_pattern(pattern)) == key


def test_names_pair_in_nfc_and_stay_as_the_files_have_them():
    assert COMPOSED != DECOMPOSED
    assert pair_by_stem([DECOMPOSED], [COMPOSED], "depth map").pairs == {DECOMPOSED: COMPOSED}
    both = pair_by_stem([DECOMPOSED], [COMPOSED, DECOMPOSED], "depth map")
    assert both.pairs == {} and both.ambiguous == (DECOMPOSED,)


def test_every_file_that_is_left_over_has_its_reason():
    pattern = compile_pattern(r"^(\d+)_")
    images = ["1_a.png", "1_b.png", "2_a.png", "3_a.png", "notes.png", "day/1_a.png"]
    truths = ["1_gt.png", "3_gt.png", "3_w.png", "3_x.png", "3_y.png", "4_gt.png", "stray.png"]
    pairing = pair_by_pattern(images, truths, "truth", pattern, pattern)
    assert pairing.pairs == {"1_a.png": "1_gt.png", "1_b.png": "1_gt.png"}
    assert pairing.unpaired == {
        "2_a.png": "no truth of the key 2",
        "3_a.png": "4 truths match it: 3_gt.png, 3_w.png, 3_x.png and 1 more",
        "notes.png": "no match",
        "day/1_a.png": "no truth of the key day/1",
    }
    assert pairing.unused == {"4_gt.png": "truth that matches no image", "stray.png": "truth that has no match"}
    assert pairing.ambiguous == ("3_a.png",) and pairing.num_images == 6
