import functools
import io
import struct
import zlib

import cv2
import h5py
import numpy as np
import pytest
import scipy.io

from corun_ray.core.data.augment import resize
from corun_ray.core.data.images import BadImage, decode_depth, decode_image, encode_png


def photograph(height_px: int = 120, width_px: int = 160) -> np.ndarray:
    """RGB with a red left half, a blue right half and some texture."""
    rng = np.random.default_rng(0)
    rgb = cv2.GaussianBlur(rng.integers(0, 120, (height_px, width_px, 3), dtype=np.uint8), (0, 0), 1.5)
    rgb[:, : width_px // 2, 0] = 220
    rgb[:, width_px // 2 :, 2] = 220
    return rgb


def encode(pixels: np.ndarray, extension: str, *options: int) -> bytes:
    if pixels.ndim == 3:
        pixels = np.dstack([pixels[..., 2::-1], pixels[..., 3:]])
    return cv2.imencode(extension, pixels, options)[1].tobytes()


def with_exif(jpeg: bytes, orientation: int, thumbnail: bytes = b"") -> bytes:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    payload = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0) + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_png_round_trip_keeps_every_value_and_the_channel_order():
    rgb = photograph()
    np.testing.assert_array_equal(decode_image(encode_png(rgb)), rgb)


@pytest.mark.parametrize("extension", [".jpg", ".webp", ".bmp", ".tiff"])
def test_other_formats_decode_as_rgb(extension):
    decoded = decode_image(encode(photograph(), extension))
    assert decoded.shape == (120, 160, 3) and decoded.dtype == np.uint8
    assert decoded[:, :70, 0].mean() > 200 and decoded[:, 90:, 2].mean() > 200


def test_grey_becomes_three_equal_channels():
    grey = photograph()[..., 1]
    np.testing.assert_array_equal(decode_image(encode(grey, ".png")), np.dstack([grey] * 3))


def test_alpha_is_dropped_and_the_colours_under_it_stay():
    rgb = photograph()
    transparent = np.dstack([rgb, np.zeros_like(rgb[..., :1])])
    np.testing.assert_array_equal(decode_image(encode(transparent, ".png")), rgb)


def test_sixteen_bit_is_scaled_and_rounded():
    deep = np.zeros((8, 8, 3), np.uint16)
    deep[0, :5, 0] = [0, 128, 129, 200 * 257, 65535]
    assert decode_image(encode(deep, ".png"))[0, :5, 0].tolist() == [0, 0, 1, 200, 255]


def test_exif_orientation_is_applied():
    upright = decode_image(with_exif(encode(photograph(), ".jpg"), orientation=6))
    assert upright.shape == (160, 120, 3)
    assert upright[:70, :, 0].mean() > 200 and upright[90:, :, 2].mean() > 200  # turned clockwise


def test_a_jpeg_decoded_small_is_upright_and_refused_when_truncated_also_grey():
    data = with_exif(encode(photograph(), ".jpg"), 6, thumbnail=encode(photograph(16, 16), ".jpg"))
    upright = decode_image(data, 30)
    assert upright.shape == (40, 30, 3)
    assert upright[:18, :, 0].mean() > 200 and upright[22:, :, 2].mean() > 200
    for fraction in (0.3, 0.6, 0.95):
        with pytest.raises(BadImage, match="truncated JPEG"):
            decode_image(data[: int(len(data) * fraction)], 30)
    grey = decode_image(encode(photograph()[..., 1], ".jpg"), 30)
    assert grey.shape == (30, 40, 3) and (grey == grey[..., :1]).all()


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("extension", "options", "reason"),
    [
        (".jpg", (), "truncated JPEG"),
        (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), "truncated JPEG"),
        (".png", (), "truncated PNG"),
        (".webp", (), "damaged"),
        (".bmp", (), "damaged"),
    ],
)
def test_a_truncated_file_is_refused(extension, options, reason, fraction):
    data = encode(photograph(), extension, *options)
    with pytest.raises(BadImage, match=reason):
        decode_image(data[: int(len(data) * fraction)])


def test_the_end_of_an_embedded_thumbnail_is_not_taken_for_the_end():
    data = with_exif(encode(photograph(), ".jpg"), 1, thumbnail=encode(photograph(16, 16), ".jpg"))
    assert decode_image(data).shape == (120, 160, 3)
    with pytest.raises(BadImage, match="truncated JPEG"):
        decode_image(data[: len(data) * 3 // 4])


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_bytes_after_the_end_do_no_harm(extension):
    data = encode(photograph(), extension)
    np.testing.assert_array_equal(decode_image(data + b"\0padding"), decode_image(data))


def test_a_png_with_a_wrong_checksum_is_refused():
    data = bytearray(encode_png(photograph()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadImage, match="damaged"):
        decode_image(bytes(data))


FOREIGN = {
    "a web page (HTML) that was saved under this name": b"<!-- saved -->\n<HTML>Sign in</HTML>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
    'a server\'s answer that was saved under this name ({ "error": "gone" })': b'{\n "error": "gone"\n}',
    "a server's answer that was saved under this name (404: Not Found)": b"404: Not Found\n",
    "a HEIC photograph, which is not read": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_saved_in_the_place_of_an_image_or_map_is_called_what_it_is(what):
    for decode in (decode_image, lambda data: decode_depth(data, ".npy"), lambda data: decode_depth(data, ".mat")):
        with pytest.raises(BadImage) as refused:
            decode(FOREIGN[what])
        assert str(refused.value).startswith(f"{what}, not a")


def test_what_is_no_image_is_refused():
    with pytest.raises(BadImage, match="not an image"):
        decode_image(b"<html>404 not found</html>")
    with pytest.raises(BadImage, match="empty"):
        decode_image(b"")


def test_a_header_that_promises_too_many_pixels_is_refused():
    header = b"IHDR" + struct.pack(">IIBBBBB", 2**30, 2**30, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(BadImage) as refused:
        decode_image(data + b"\0\0\0\0IEND\xaeB`\x82")
    assert "\n" not in str(refused.value)


def test_floating_point_pixels_are_refused():
    with pytest.raises(BadImage, match="float32"):
        decode_image(encode(photograph().astype(np.float32), ".tiff"))


def test_a_side_under_eight_px_is_refused():
    assert decode_image(encode_png(photograph(8, 20))).shape == (8, 20, 3)
    with pytest.raises(BadImage, match="20 x 7 px"):
        decode_image(encode_png(photograph(7, 20)))


def matlab73(arrays) -> bytes:
    """A file of version 7.3 as MATLAB writes it: its own header, then HDF5 with the columns of each array first."""
    content = plain_hdf5({name: np.asarray(array).T for name, array in arrays.items()}, userblock_size=512)
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    return header + content[len(header) :]


def plain_hdf5(arrays, userblock_size: int = 0) -> bytes:
    """An HDF5 file; with MATLAB's attributes where it leaves room for MATLAB's header."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", userblock_size=userblock_size) as file:
        for name, array in arrays.items():
            is_text = array.dtype.kind == "U"
            # MATLAB has two sides or more, text as numbers, and pairs of fields for complex numbers.
            array = (
                np.frombuffer(str(array).encode("utf-16-le"), np.uint16)[:, None] if is_text else np.atleast_2d(array)
            )
            if array.dtype.kind == "c":
                array = array.view([("real", "f8"), ("imag", "f8")])
            item = file.create_dataset(name, data=array)
            if userblock_size:
                kinds = {"f8": "double", "f4": "single", "V16": "double"}
                kind = "char" if is_text else kinds.get(array.dtype.str[1:], array.dtype.name)
                item.attrs["MATLAB_class"] = np.bytes_(kind)
    return buffer.getvalue()


def older_mat(arrays, version: str) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays, format=version, do_compression=version == "5")
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "uint16", "int32", ">f4"])
def test_npy_depth_of_any_real_dtype(dtype):
    depth = np.arange(12).reshape(3, 4).astype(dtype)
    for stored in (depth, depth[None], depth[..., None], np.asfortranarray(depth)):
        decoded = decode_depth(npy(stored), ".NPY")
        np.testing.assert_array_equal(decoded, np.arange(12).reshape(3, 4))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_depth_keeps_its_values(dtype):
    depth = np.linspace(0, np.iinfo(dtype).max, 64).reshape(8, 8).astype(dtype)
    for stored in (depth, np.dstack([depth] * 3)):
        np.testing.assert_array_equal(decode_depth(encode(stored, ".png"), ".png"), depth)


@pytest.mark.parametrize(
    ("depth", "reason"),
    [
        (np.zeros((2, 4, 5)), "shape .2, 4, 5."),
        (np.zeros(5), "shape .5,."),
        (np.zeros((0, 5)), "empty"),
        (np.zeros((4, 5), complex), "complex128"),
        (np.array([["near", "far"]]), "real numbers"),
    ],
)
def test_an_unusable_npy_depth_is_refused(depth, reason):
    with pytest.raises(BadImage, match=reason):
        decode_depth(npy(depth), ".npy")


def test_a_pickled_or_truncated_or_foreign_npy_is_refused():
    whole = npy(np.arange(12.0).reshape(3, 4))
    unclosed, huge = whole.replace(b"}", b" "), whole.replace(b"(3, 4), ", b"(3" + b"0" * 5 + b",)")
    for data in (npy(np.array([[{}]])), whole[:-8], whole[:30], unclosed, huge, b"", b"PK\x03\x04 a zip"):
        with pytest.raises(BadImage, match="not a readable .npy file") as refused:
            decode_depth(data, ".npy")
        assert "\n" not in str(refused.value)


def test_other_unusable_depth_files_are_refused():
    with pytest.raises(BadImage, match="colour"):
        decode_depth(encode_png(photograph()), ".png")
    with pytest.raises(BadImage, match="'.txt', expected .npy, .png or .mat"):
        decode_depth(b"1 2 3", ".txt")


DEPTH = np.arange(1.0, 13).reshape(3, 4)
MAT_VERSIONS = [matlab73, functools.partial(older_mat, version="5"), functools.partial(older_mat, version="4")]


@pytest.mark.parametrize("write", MAT_VERSIONS, ids=["7.3", "5", "4"])
def test_mat_depth_has_the_rows_that_matlab_had(write):
    others = {"name": "view 3", "scale": np.float64(0.5), "rows": np.arange(7.0)[None]}
    for arrays in ({"depth": DEPTH}, {"Z": DEPTH}, {"depth": DEPTH, "again": DEPTH + 1}, {"Z": DEPTH, **others}):
        np.testing.assert_array_equal(decode_depth(write(arrays), ".mat"), DEPTH)


@pytest.mark.parametrize("write", MAT_VERSIONS[:2], ids=["7.3", "5"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "uint16"])
def test_mat_depth_of_any_type_and_with_a_third_side_of_one(write, dtype):
    for stored in (DEPTH, DEPTH[..., None]):
        decoded = decode_depth(write({"depth": stored.astype(dtype)}), ".MAT")
        assert decoded.dtype == dtype
        np.testing.assert_array_equal(decoded, DEPTH)


def test_an_hdf5_file_that_matlab_did_not_write_stays_as_it_is():
    np.testing.assert_array_equal(decode_depth(plain_hdf5({"depth": DEPTH}), ".mat"), DEPTH)


@pytest.mark.parametrize("write", MAT_VERSIONS[:2], ids=["7.3", "5"])
@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (
            {"a": DEPTH, "b": DEPTH.astype("uint8")},
            r"holds a \(double 3 x 4\), b \(uint8 3 x 4\); expected an array 'dep",
        ),
        ({"Depth": np.zeros((2, 3, 4))}, r"holds Depth \(double 2 x 3 x 4\); expected an array 'depth', or just one"),
        ({"scale": np.float64(2)}, r"holds scale \(double 1 x 1\)"),
        ({chr(97 + n): np.float64(n) for n in range(9)}, r"f \(double 1 x 1\), 3 more; expected"),
        ({"depth": "near"}, "array 'depth' is char.*, expected real numbers"),
        ({"depth": DEPTH * 1j}, "complex.*, expected real numbers"),
        ({"depth": np.zeros((2, 3, 4))}, "shape .2, 3, 4., expected H W, 1 H W or H W 1"),
        ({}, "holds nothing; expected"),
    ],
)
def test_a_mat_file_without_a_depth_map_tells_what_it_holds(write, arrays, reason):
    with pytest.raises(BadImage, match=reason) as refused:
        decode_depth(write(arrays), ".mat")
    assert "\n" not in str(refused.value)


def test_a_damaged_mat_file_is_refused():
    for whole in (matlab73({"depth": DEPTH}), older_mat({"depth": DEPTH}, "5")):
        for data in (whole[: len(whole) // 2], whole[:129], whole[:130] + bytes(range(256)), b"", b"text\0"):
            with pytest.raises(BadImage, match="not a readable .mat file") as refused:
                decode_depth(data, ".mat")
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("least_px", "sides"), [(60, (60, 81)), (61, (120, 161)), (120, (120, 161)), (240, (240, 322)), (241, (480, 643))]
)
def test_a_jpeg_is_decoded_no_smaller_than_asked(least_px, sides):
    thumbnail = encode(photograph(16, 16), ".jpg")  # whose size is not the photograph's
    data = with_exif(encode(photograph(480, 643), ".jpg"), 1, thumbnail=thumbnail)
    assert decode_image(data, least_px=least_px).shape == (*sides, 3)
    assert decode_image(encode(photograph(480, 643), ".png"), least_px=least_px).shape == (480, 643, 3)


@pytest.mark.parametrize("options", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)])
def test_a_reduced_photograph_is_the_whole_one_made_smaller(options):
    data = with_exif(encode(photograph(960, 1280), ".jpg", *options), orientation=6)
    whole, reduced = decode_image(data), decode_image(data, least_px=288)
    assert (whole.shape, reduced.shape) == ((1280, 960, 3), (640, 480, 3))
    patches = [resize(image, 288, 288).astype(int) for image in (whole, reduced)]
    assert np.abs(patches[0] - patches[1]).mean() < 1
    assert patches[0].std() == pytest.approx(patches[1].std(), rel=0.01)


def test_a_truncated_file_is_refused_at_any_size():
    data = encode(photograph(960, 1280), ".jpg")
    with pytest.raises(BadImage, match="truncated JPEG"):
        decode_image(data[: len(data) // 2], least_px=288)
