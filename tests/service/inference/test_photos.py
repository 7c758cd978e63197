"""Photographs through a file and back: bits, colours, profile and orientation, judged by Pillow and tifffile."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from corun_ray.core.data.images import BadImage, decode_image
from corun_ray.service.inference.photos import ORIENTATION_TAG, Photo, read_photo, write_photo
from tests.conftest import photograph

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
MAKER_TAG, ROTATED = 271, 6
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif"}


def file_of(format: str, exif: bool = True) -> tuple[bytes, np.ndarray]:
    pixels = photograph(np.random.default_rng(0), 40, 56)
    tags = Image.Exif()
    tags[ORIENTATION_TAG], tags[MAKER_TAG] = ROTATED, "Maker"
    buffer = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(pixels).save(buffer, format, icc_profile=PROFILE, exif=tags if exif else None, **options)
    return buffer.getvalue(), pixels


@pytest.mark.parametrize("format", FORMATS)
def test_upright_with_its_profile(format):
    data, pixels = file_of(format)
    photo = read_photo(data)
    assert photo.pixels.shape == (56, 40, 3) and photo.colour_profile == PROFILE
    assert np.abs(photo.pixels.astype(int) - np.rot90(pixels, -1)).mean() < (12 if format == "JPEG" else 0.01)
    with Image.open(io.BytesIO(write_photo(photo, FORMATS[format]))) as written:
        assert written.format == format and written.size == (40, 56)
        assert written.info["icc_profile"] == PROFILE
        assert written.getexif().get(ORIENTATION_TAG, 1) == 1
        if format != "TIFF":
            assert written.getexif()[MAKER_TAG] == "Maker"


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".bmp"])
def test_lossless_formats_keep_every_pixel(suffix):
    pixels = photograph(np.random.default_rng(1), 33, 47)
    assert (read_photo(write_photo(Photo(pixels), suffix)).pixels == pixels).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_with_a_profile(suffix):
    pixels = np.random.default_rng(2).integers(0, 65536, (20, 24, 3)).astype(np.uint16)
    again = read_photo(write_photo(Photo(pixels, PROFILE), suffix))
    assert again.pixels.dtype == np.uint16 and (again.pixels == pixels).all() and again.colour_profile == PROFILE


def test_other_libraries_read_the_sixteen_bit_tiff():
    pixels = np.random.default_rng(2).integers(0, 65536, (20, 24, 3)).astype(np.uint16)
    assert (tifffile.imread(io.BytesIO(write_photo(Photo(pixels), ".tiff"))) == pixels).all()


def test_eight_bit_formats_take_sixteen_bits_rounded():
    pixels = np.full((16, 16, 3), 257 * 100 + 128, np.uint16)
    assert (decode_image(write_photo(Photo(pixels), ".jpeg")) == 100).all()


def test_a_photograph_without_profile_or_exif_gets_none():
    photo = read_photo(write_photo(Photo(photograph(np.random.default_rng(3), 20, 20)), ".png"))
    assert photo.colour_profile is None and photo.exif is None


def test_no_image_is_refused():
    with pytest.raises(BadImage, match="not an image"):
        read_photo(b"text")
