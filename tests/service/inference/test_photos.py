"""Photographs through a file and back: bits, colours, profile and orientation, judged by Pillow and tifffile."""

import io
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from PIL.ExifTags import IFD, Base

from corun_ray.core.data.images import BadImage, decode_image
from corun_ray.service.inference.photos import ORIENTATION_TAG, Photo, read_photo, write_photo
from tests.conftest import photograph

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKER_TAG, ROTATED = 271, 6
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tif", "AVIF": ".avif"}


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
    assert np.abs(photo.pixels.astype(int) - np.rot90(pixels, -1)).mean() < (12 if format in ("JPEG", "AVIF") else 0.01)
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


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("space", "mode"), [(b"GRAY", "L"), (b"CMYK", "CMYK")])
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_profile_of_other_colours_than_rgb_is_not_written_beside_rgb(space, mode, format):
    profile = PROFILE[:16] + space + PROFILE[20:]
    image = Image.fromarray(photograph(np.random.default_rng(0), 40, 56)).convert(mode)
    photo = read_photo(save(image, format, icc_profile=profile))
    assert photo.colour_profile is None
    assert photo.notes == (f"colour profile dropped: of {space.decode()} colours, and RGB is written",)
    assert read_photo(save(image, format, icc_profile=PROFILE)).colour_profile == PROFILE
    assert read_photo(save(image, format, icc_profile=PROFILE[:90])).notes == ("colour profile dropped: damaged",)


def test_alpha_is_dropped_with_a_word_and_equal_in_every_format():
    rgb = photograph(np.random.default_rng(0), 40, 56)
    ramp = np.broadcast_to(np.linspace(0, 255, 56).astype(np.uint8), (40, 56))
    rgba = np.dstack([rgb, ramp])
    deep = cv2.imencode(".tif", cv2.cvtColor(rgba.astype(np.uint16) * 257, cv2.COLOR_RGBA2BGRA))[1].tobytes()
    files = [save(Image.fromarray(rgba), "TIFF"), save(Image.fromarray(rgba), "PNG"), deep]
    for data in files:
        assert (decode_image(data) == rgb).all() and read_photo(data).notes == ("alpha channel dropped",)
    one_colour = save(Image.fromarray(rgb), "PNG", transparency=(10, 10, 10))
    assert read_photo(one_colour).notes == ("alpha channel dropped",)
    assert read_photo(save(Image.fromarray(rgb), "TIFF")).notes == ()


def test_exif_data_that_no_longer_hold_are_not_kept():
    tags = Image.Exif()
    tags[ORIENTATION_TAG], tags[Base.BitsPerSample], tags[Base.ImageWidth] = ROTATED, 8, 56
    tags.get_ifd(IFD.Exif).update({int(Base.ExifImageWidth): 56, int(Base.ExifImageHeight): 40})
    data = save(Image.fromarray(photograph(np.random.default_rng(0), 40, 56)), "JPEG", exif=tags)
    with Image.open(io.BytesIO(write_photo(read_photo(data), ".jfif"))) as written:
        exif = written.getexif()
        assert written.format == "JPEG" and written.size == (40, 56)
        assert (exif[ORIENTATION_TAG], exif[Base.ImageWidth], exif.get(Base.BitsPerSample)) == (1, 40, None)
        sides = exif.get_ifd(IFD.Exif)
        assert (sides[Base.ExifImageWidth], sides[Base.ExifImageHeight]) == (40, 56)


def test_a_gamma_that_no_profile_explains_is_named():
    chunk = b"gAMA" + (100_000).to_bytes(4, "big")
    plain = save(Image.fromarray(photograph(np.random.default_rng(0), 40, 56)), "PNG")
    linear = plain[:33] + b"\0\0\0\4" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + plain[33:]
    assert read_photo(linear).notes == ("gamma of 1 dropped, so that viewers take 0.4545",)
    assert read_photo(plain).notes == ()


def test_no_image_is_refused():
    with pytest.raises(BadImage, match="not an image"):
        read_photo(b"text")
