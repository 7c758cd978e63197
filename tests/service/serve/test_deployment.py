"""A model served by Ray Serve: its answers, what it refuses, its page in a browser, and its end."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from playwright.sync_api import Page, sync_playwright
from ray import serve

from corun_ray.core.data.images import decode_pixels
from corun_ray.core.networks.corun import CORUN
from corun_ray.service.inference.photos import Photo, read_photo, write_photo
from corun_ray.service.serve.deployment import identify
from corun_ray.service.serve.messages import ServedModel
from tests.conftest import photograph, write_image
from tests.service.inference.test_photos import PROFILE
from tests.service.report.test_page import CHROMIUM
from tests.service.serve.bad_uploads import bad_uploads
from tests.service.serve.serve_requests import ask
from tests.service.serve.serving import (
    MAX_MIB,
    PNG,
    SIZES,
    Running,
    assert_is_restored,
    command,
    interrupted,
    replicas,
    running,
)


@pytest.fixture(scope="module")
def served(local_ray) -> Iterator[Running]:
    with running(batch_wait_s=0.2) as here:
        yield here


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/runs/x/checkpoint", "checkpoint"),
        ("s3://haze/net.pth", "net.pth"),
        ("runs:/1a2b/model", "1a2b/model"),
    ],
)
def test_of_a_model_that_is_not_registered_its_name_alone_is_told(source, name):
    assert identify(source, "") == (source, ServedModel(name, None))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_the_answer_is_the_restored_image_in_its_own_size_and_format(served, suffix):
    data = cv2.imencode(suffix, photograph(np.random.default_rng(1), 40, 64))[1].tobytes()
    answer = ask(f"{served.url}/dehaze", data)
    assert_is_restored(answer, served.restored(decode_pixels(data)), suffix)
    assert answer.body[:4] == write_photo(Photo(decode_pixels(data)), suffix)[:4]
    assert answer.headers["x-corun-model"] == "net/7" and "restore;dur=" in answer.headers["server-timing"]


def test_sixteen_bits_profile_and_exif_are_kept_and_another_format_may_be_asked_for(served):
    fine = np.linspace(9000, 52000, 48 * 40 * 3).reshape(48, 40, 3).astype(np.uint16)
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\0\0\0\0"
    data = write_photo(Photo(fine, colour_profile=PROFILE, exif=exif), ".png")
    kept = read_photo(ask(f"{served.url}/dehaze", data, PNG).body)
    assert kept.pixels.dtype == np.uint16 and np.array_equal(kept.pixels, served.restored(fine))
    assert kept.colour_profile == PROFILE and kept.exif == exif
    tiff = ask(f"{served.url}/dehaze?format=tif", data, PNG)
    assert tiff.headers["content-type"] == "image/tiff" and np.array_equal(decode_pixels(tiff.body), kept.pixels)


def test_images_that_come_at_once_are_restored_together_and_come_out_the_same(served):
    images = [photograph(np.random.default_rng(n), *SIZES[n % 2]) for n in range(10)]
    files = [write_photo(Photo(image), ".png") for image in images]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda data: ask(f"{served.url}/dehaze", data, PNG), files))
    for image, answer in zip(images, answers, strict=True):
        assert_is_restored(answer, served.restored(image))
    assert max(int(answer.headers["x-corun-batch"]) for answer in answers) > 1


BAD = bad_uploads(MAX_MIB)
MEDIA_TYPE = re.compile(r"\b(image|multipart)/[a-z-]+")


def test_bad_uploads_are_refused_with_a_reason_and_the_replica_goes_on(served):
    before = replicas()
    for name, upload in BAD.items():
        answer = ask(
            f"{served.url}/dehaze{upload.query}", upload.body, {"Content-Type": upload.media_type, **upload.headers}
        )
        assert answer.status == upload.status, (name, answer)
        (reason,) = json.loads(answer.body).values()
        assert reason and "\n" not in reason and "/" not in MEDIA_TYPE.sub("", reason), (name, reason)
    assert replicas() == before and ask(f"{served.url}/healthz").status == 200


def test_a_body_of_untold_length_is_bounded_too(served):
    answer = ask(f"{served.url}/dehaze", iter([bytes(2**16)] * (16 * MAX_MIB + 1)), PNG)
    assert answer.status == 413 and json.loads(answer.body) == {"error": "the file is larger than 1 MiB"}


def test_health_is_told_while_an_image_is_restored(served):
    large = write_photo(Photo(photograph(np.random.default_rng(0), 900, 1200)), ".jpg")
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(ask, f"{served.url}/dehaze", large)
        while "corun_serve_in_flight 1.0" not in ask(f"{served.url}/metrics").body.decode():
            assert not working.done()
        assert ask(f"{served.url}/healthz").status == 200
        assert not working.done()
        assert working.result().status == 200


def test_health_and_metrics(served):
    photo = write_photo(Photo(photograph(np.random.default_rng(1), 40, 64)), ".png")
    assert ask(f"{served.url}/dehaze", photo).status == 200
    assert ask(f"{served.url}/dehaze", bytes(MAX_MIB * 2**20 + 1)).status == 413
    health = ask(f"{served.url}/healthz")
    assert (health.status, json.loads(health.body)) == (
        200,
        {"status": "ok", "model": "net", "version": "7", "device": "cpu"},
    )
    metrics = ask(f"{served.url}/metrics").body.decode()
    assert re.search(r'^corun_serve_requests_total\{status="200"\} [1-9]', metrics, re.MULTILINE)
    assert re.search(r'^corun_serve_requests_total\{status="413"\} [1-9]', metrics, re.MULTILINE)
    assert re.search(r"^corun_serve_megapixels_total [\d.]+$", metrics, re.MULTILINE)


def test_the_command_adds_an_application_and_takes_it_away_at_ctrl_c(served, tmp_path):
    with command(tmp_path, served, "--name", "other", "--path", "/other") as (process, url):
        assert url == f"{served.url}/other", "Serve's address is that of the first application"
        assert json.loads(ask(f"{url}/healthz").body)["model"] == "net.pth"
        image = photograph(np.random.default_rng(3), 40, 64)
        assert_is_restored(ask(f"{url}/dehaze", write_photo(Photo(image), ".png")), served.restored(image))
        assert "stopped" in interrupted(process)
    assert set(serve.status().applications) == {"dehazing"} and ask(f"{served.url}/healthz").status == 200


def test_a_taken_port_is_told_before_ray_starts(tmp_path):
    torch.save(CORUN(2, 4).state_dict(), tmp_path / "net.pth")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = [sys.executable, "-m", "corun_ray", "serve", str(tmp_path / "net.pth"), "--port", str(port)]
        # MLflow, in this process, leaves variables for the processes that it starts.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        result = subprocess.run(line, capture_output=True, text=True, env=environment | {"RAY_ADDRESS": ""})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"serve.port: cannot listen at 127.0.0.1, port {port}: address already in use\n"


@pytest.fixture(params=[(1200, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, served) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    width, height = request.param
    asked: list[str] = []
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": height}, has_touch=width < 500)
        page.on("request", lambda one: asked.append(one.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(f"{served.url}/")
        yield page
        browser.close()
    # That a request was refused is the browser's own line.
    assert [text for text in problems if "status of 4" not in text] == []
    assert all(url.startswith((served.url, "blob:", "data:")) for url in asked)


def test_the_page_restores_compares_and_tells_what_is_wrong(page, tmp_path):
    write_image(tmp_path / "view.png", photograph(np.random.default_rng(0), 120, 160))
    (tmp_path / "bad.jpg").write_text("no picture")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    choose = page.get_by_label("Drop a photograph here, paste one, or choose a file")
    choose.set_input_files(tmp_path / "view.png")
    page.wait_for_selector("#result:not([hidden])")
    assert "Done: view.png, 160 × 120 px" in page.get_by_role("status").inner_text()
    assert page.evaluate("[...document.images].every(image => image.naturalWidth === 160)")
    slider = page.get_by_role("slider")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert slider.input_value() == "40"
    assert page.evaluate("document.getElementById('stack').style.getPropertyValue('--at')") == "40%"
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "view-dehazed.png"
    assert decode_pixels(Path(download.value.path()).read_bytes()).shape == (120, 160, 3)
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]
    choose.set_input_files(tmp_path / "bad.jpg")
    page.wait_for_selector("#error:not([hidden])")
    assert "bad.jpg: not an image" in page.get_by_role("alert").inner_text()
    assert page.locator("#result").is_hidden()
    (tmp_path / "large.jpg").write_bytes(bytes(MAX_MIB * 2**20 + 1))
    choose.set_input_files(tmp_path / "large.jpg")
    assert "at most 1 MiB are taken" in page.get_by_role("alert").inner_text()


def test_a_file_that_the_browser_cannot_show_can_be_downloaded(page, tmp_path):
    write_image(tmp_path / "view.tif", photograph(np.random.default_rng(0), 40, 60))
    page.set_input_files("#file", tmp_path / "view.tif")
    page.wait_for_selector("#result:not([hidden])")
    assert "cannot show" in page.get_by_role("status").inner_text()
    assert page.locator("#compare").is_hidden()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "view-dehazed.tif"
