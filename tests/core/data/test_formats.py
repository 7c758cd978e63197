"""Files that OpenCV alone reads otherwise than they are meant, drawn here and judged by what was drawn."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from corun_ray.core.data.images import BadImage, decode_image, decode_pixels
from tests.conftest import photograph

ROTATED = 6
ORIENTATION_TAG = 274


@pytest.fixture(scope="module")
def rgb() -> np.ndarray:
    return photograph(np.random.default_rng(0), 40, 56)


def with_alpha(rgb: np.ndarray, least: int = 0) -> np.ndarray:
    ramp = np.linspace(least, 255, rgb.shape[1]).astype(np.uint8)
    return np.dstack([rgb, np.broadcast_to(ramp, rgb.shape[:2])])


def save(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, photometric: str = "rgb", **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric=photometric, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("options", [{"compression": "zlib"}, {"tile": (32, 32)}, {"bigtiff": True}])
def test_the_colours_under_a_tiff_s_alpha_stay(rgb, bits, options):
    pixels = with_alpha(rgb) if bits == 8 else with_alpha(rgb).astype(np.uint16) * 257
    for kind in ("unassalpha", "unspecified"):
        assert (decode_pixels(tiff(pixels, extrasamples=[kind], **options)) == pixels[..., :3]).all()


def test_a_tiff_s_colours_that_are_multiplied_by_alpha_are_divided_again(rgb):
    pixels = with_alpha(rgb, least=40)
    multiplied = np.round(pixels[..., :3] * (pixels[..., 3:] / 255)).astype(np.uint8)
    data = tiff(np.dstack([multiplied, pixels[..., 3]]), extrasamples=["assocalpha"])
    assert np.abs(decode_image(data).astype(int) - rgb).max() <= 4
    clear = tiff(np.dstack([multiplied, np.zeros_like(multiplied[..., 0])]), extrasamples=["assocalpha"])
    assert not decode_image(clear).any(), "nothing is known of colours under no alpha"


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_0_is_not_turned_negative(rgb, bits):
    grey = rgb[..., 1] if bits == 8 else rgb[..., 1].astype(np.uint16) * 257
    data = tiff(np.iinfo(grey.dtype).max - grey, "miniswhite")
    assert (decode_pixels(data) == grey[..., None]).all()


def test_tiffs_that_would_be_read_wrongly_are_refused_by_their_reason(rgb):
    lab = ImageCms.profileToProfile(
        Image.fromarray(rgb), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    with pytest.raises(BadImage, match="colour space CIELAB, expected RGB"):
        decode_image(save(lab, "TIFF"))
    planes = np.moveaxis(rgb.astype(np.uint16), 2, 0)
    with pytest.raises(BadImage, match="16 bits in separate planes"):
        decode_image(tiff(planes, planarconfig="separate"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_one_frame_of_several_is_not_taken_for_the_image(rgb, format):
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    with pytest.raises(BadImage, match="several frames or pages, expected one image"):
        decode_image(save(frames[0], format, save_all=True, append_images=frames[1:]))
    assert decode_image(save(frames[0], format)).shape == rgb.shape


def test_a_smaller_copy_in_a_tiff_is_no_second_image(rgb):
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(rgb, photometric="rgb")
        writer.write(rgb[::2, ::2], photometric="rgb", subfiletype=1)
    assert (decode_image(buffer.getvalue()) == rgb).all()


def test_an_avif_is_upright_with_8_bits(rgb):
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = ROTATED
    image = Image.fromarray(with_alpha(rgb))
    decoded = decode_image(save(image, "AVIF", quality=100, exif=tags)).astype(int)
    assert np.abs(decoded - np.rot90(rgb, -1)).mean() < 6
    with pytest.raises(BadImage, match="damaged"):
        decode_image(save(image, "AVIF")[:-40])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_an_avif_is_the_one_of_a_jpeg(rgb, orientation):
    tags = Image.Exif()
    tags[ORIENTATION_TAG] = orientation
    large = Image.fromarray(rgb).resize((112, 80))
    files = [save(large, format, quality=95, exif=tags.tobytes()) for format in ("AVIF", "JPEG")]
    avif, jpeg = (decode_image(file).astype(int) for file in files)
    assert avif.shape == jpeg.shape and np.abs(avif - jpeg).mean() < 8
