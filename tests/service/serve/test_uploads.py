"""What may be uploaded, judged by headers and first bytes alone."""

import asyncio
import tracemalloc

import cv2
import numpy as np
import pytest

from corun_ray.service.serve.uploads import (
    ImageHeader,
    Refusal,
    UploadLimits,
    check_headers,
    check_image,
    parse_format,
    read_body,
    read_header,
)
from tests.service.serve.bad_uploads import bad_uploads, encoded, png, tiff, webp_of_size

LIMITS = UploadLimits(max_upload_mib=1, max_megapixels=25, min_side_px=16)
BAD = bad_uploads(LIMITS.max_upload_mib)
BY_A_REPLICA = {"truncated JPEG", "truncated PNG", "PNG with damaged pixels"}
"""What only decoding shows."""


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
def test_the_size_is_read_from_the_header(suffix):
    header = check_image(encoded(suffix, 48, 64), LIMITS)
    assert (header.suffix, header.width_px, header.height_px) == (suffix, 64, 48)


def test_webp_of_all_three_kinds_and_16_bit_and_tiled_files_are_read():
    fine = np.zeros((48, 64, 3), np.uint16)
    lossless = cv2.imencode(".webp", np.zeros((48, 64, 3), np.uint8), [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    files = [cv2.imencode(".png", fine)[1].tobytes(), lossless, webp_of_size(64, 48)]
    files += [tiff(fine, photometric="rgb"), tiff(fine, photometric="rgb", tile=(16, 16))]
    for data in files:
        header = check_image(data, LIMITS)
        assert (header.width_px, header.height_px) == (64, 48)


@pytest.mark.parametrize("name", BAD)
def test_bad_uploads_are_refused_with_their_status_and_without_decoding(name):
    upload = BAD[name]
    headers = {"content-type": upload.media_type, "content-length": str(len(upload.body))}
    headers |= {key.lower(): value for key, value in upload.headers.items()}
    query = dict([upload.query[1:].split("=")]) if upload.query else {}
    tracemalloc.start()
    try:
        parse_format(query)
        check_headers(headers, LIMITS)
        check_image(upload.body, LIMITS)
        refused = None
    except Refusal as error:
        refused = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    if name in BY_A_REPLICA:
        assert refused is None
    else:
        assert refused is not None and refused.status == upload.status
        assert refused.reason and "\n" not in refused.reason


def test_files_cut_anywhere_are_refused_or_of_a_known_size():
    rng = np.random.default_rng(0)
    for suffix in (".jpg", ".png", ".webp", ".tif", ".bmp"):
        whole = encoded(suffix)
        for _ in range(40):
            data = bytearray(whole[: rng.integers(1, len(whole))])
            data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
            header = read_header(bytes(data))
            assert header is None or isinstance(header.width_px, int)


def test_an_animation_of_png_is_refused():
    frames = [(b"acTL", (2).to_bytes(4, "big") + bytes(4)), (b"fcTL", bytes(26)), (b"IDAT", b"")]
    assert read_header(png(64, 48, *frames)) == ImageHeader(".png", 64, 48, has_frames=True)


async def _chunks(number: int, size: int, wait_s: float = 0.0):
    for _ in range(number):
        await asyncio.sleep(wait_s)
        yield bytes(size)


def test_a_body_is_bounded_in_bytes_and_time():
    limit = LIMITS.max_bytes
    assert asyncio.run(read_body(_chunks(4, limit // 4), LIMITS, 5)) == bytes(limit)
    with pytest.raises(Refusal) as refused:
        asyncio.run(read_body(_chunks(10**9, limit // 3), LIMITS, 5))
    assert refused.value.status == 413
    with pytest.raises(Refusal) as refused:
        asyncio.run(read_body(_chunks(100, 1, 0.02), LIMITS, 0.1))
    assert refused.value.status == 408


def test_what_is_taken():
    for media_type in ("image/jpeg", "IMAGE/PNG", "image/jpg; q=1", "application/octet-stream"):
        check_headers({"content-type": media_type, "content-length": str(LIMITS.max_bytes)}, LIMITS)
    check_headers({}, LIMITS)
    assert parse_format({}) is None and parse_format({"format": "tif"}) == ".tif"
