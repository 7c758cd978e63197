import io

import cv2
import numpy as np
import pytest
from PIL import Image

from corun_ray.core.data.images import BadImage, decode_image, encode_png
from corun_ray.service.data.sample_maker import decode_region, read_cuttable_sides
from tests.core.data.test_images import encode, photograph, with_exif

HEIGHT_PX, WIDTH_PX = 203, 310
SAMPLING, RESTART, PROGRESSIVE = (
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_RST_INTERVAL,
    cv2.IMWRITE_JPEG_PROGRESSIVE,
)


def textured() -> np.ndarray:
    """Noise in every channel: what is interpolated from other rows than the whole's would differ."""
    return np.random.default_rng(1).integers(0, 256, (HEIGHT_PX, WIDTH_PX, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        (),
        (SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
        (SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422),
        (SAMPLING, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
        (RESTART, 4),
        (PROGRESSIVE, 1),
    ],
    ids=["420", "444", "422", "440", "restarts", "progressive"],
)
def test_a_region_has_the_pixels_of_the_whole_whatever_was_left_out(options, capfd):
    data = encode(textured(), ".jpg", *options)
    whole = decode_image(data)
    assert read_cuttable_sides(data) == (HEIGHT_PX, WIDTH_PX)
    for top, side in [(0, 8), (0, 16), (1, 47), (30, 100), (HEIGHT_PX - 40, 40), (0, HEIGHT_PX)]:
        rows, columns = slice(top, top + side), slice(5, 5 + side)
        np.testing.assert_array_equal(decode_region(data, rows, columns), whole[rows, columns])
    assert capfd.readouterr() == ("", "")


def test_what_lies_below_a_region_is_not_decoded():
    data = bytearray(encode(textured(), ".jpg"))
    whole = decode_image(bytes(data))
    data[-len(data) // 4 : -2] = bytes(len(data[-len(data) // 4 : -2]))
    assert not np.array_equal(decode_image(bytes(data)), whole)
    np.testing.assert_array_equal(decode_region(bytes(data), slice(0, 90), slice(0, 90)), whole[:90, :90])


def test_files_that_other_rules_hold_for_are_decoded_as_a_whole():
    data = encode(photograph(), ".jpg")
    assert read_cuttable_sides(with_exif(data, orientation=1)) == (120, 160)
    assert read_cuttable_sides(with_exif(data, orientation=6)) is None
    assert read_cuttable_sides(encode(photograph()[..., 1], ".jpg")) is None
    assert read_cuttable_sides(encode_png(photograph())) is None
    assert read_cuttable_sides(data[:-2]) is None
    assert read_cuttable_sides(encode(photograph(7, 20), ".jpg")) is None
    assert read_cuttable_sides(b"\xff\xd8\xff") is None
    inks = io.BytesIO()
    Image.fromarray(photograph()).convert("CMYK").save(inks, "jpeg")
    assert read_cuttable_sides(inks.getvalue()) is None
    frame = data.index(b"\xff\xc0")
    assert read_cuttable_sides(data[: frame + 5] + b"\xff\xff\xff\xff" + data[frame + 9 :]) is None  # 4 gigapixels


def test_a_region_of_a_damaged_file_is_refused_as_the_whole_is():
    data = encode(textured(), ".jpg")
    tables = data.index(b"\xff\xc4")
    damaged = data[: tables + 5] + b"\xff" * 16 + data[tables + 21 :]
    assert read_cuttable_sides(damaged) == (HEIGHT_PX, WIDTH_PX)
    with pytest.raises(BadImage, match="not an image, or a damaged one"):
        decode_region(damaged, slice(0, 40), slice(0, 40))
