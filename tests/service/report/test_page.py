"""The report: a page that stands alone, holds what a run came to, and works in a real browser, also on a phone."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Page, sync_playwright

from corun_ray.core.inference.pictures import encode_thumbnail
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoint_record import SPEC_FILE
from corun_ray.core.training.checkpoints import save_network
from corun_ray.service.report.charts import draw_line_chart
from corun_ray.service.report.page import Listing, PageSection, Table, render
from corun_ray.service.runs.held_out import EXAMPLES, HAZY_PICTURE, MeasuredImage, ValidationLog, name_picture
from corun_ray.service.storage import locate
from corun_ray.service.train.best import BestCheckpoint
from corun_ray.service.train.report import build_training_report
from tests.conftest import photograph
from tests.service.jobs import small_job

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IMAGES, STEPS = ["a.png", "b.png", "c.png"], [2, 4]
CURVES = {
    "loss/total": [(1, 0.5), (2, 0.4), (4, 0.3)],
    "loss/pixel": [(1, 0.3), (2, 0.2), (4, 0.1)],
    "pool/labels": [(1, 2.0), (4, 6.0)],
    "pool/win_rate": [(1, 1.0), (4, 0.25)],
    "val/fade": [(2, 1.5), (4, 1.2)],
    "optim/lr": [(1, 1e-4), (4, 1e-5)],
}


@pytest.fixture(scope="module")
def page_file(dataset, tmp_path_factory) -> Path:
    """The report of a run with three validation images; two have pictures at every validation."""
    folder = tmp_path_factory.mktemp("report")
    job = small_job("colabator", dataset, folder)
    rng, log = np.random.default_rng(0), ValidationLog()
    for number, image in enumerate(IMAGES):
        place = folder / "run" / EXAMPLES / "val" / image
        place.mkdir(parents=True)
        (place / HAZY_PICTURE).write_bytes(encode_thumbnail(photograph(rng, 90, 120), 640))
        for step in STEPS if number < 2 else STEPS[-1:]:
            (place / name_picture(step)).write_bytes(encode_thumbnail(photograph(rng, 90, 120), 640))
    for step in STEPS:
        log.add(step, [MeasuredImage("val", image, {"fade": 3.0 - n / step}) for n, image in enumerate(IMAGES)])
    network = CORUN(2, 4)
    save_network(folder / "network.pth", network, network)
    (folder / SPEC_FILE).write_text(NetworkSpec("corun", {"stages": 2, "width": 4}).to_json())
    facts = {"data": "8 clear <with> depth maps", "workers": "1 x 1 CPU"}
    content = build_training_report(job, locate(str(folder / "run")), folder, facts, CURVES, log)
    path = folder / "report.html"
    path.write_bytes(content)
    return path


def test_it_has_every_section_and_nothing_from_elsewhere(page_file):
    text = page_file.read_text()
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", text)
    assert headings == [
        *("Result", "Before and after", "Best and worst", "Curves", "Label pool", "Stages", "Job", "Environment")
    ]
    assert "&lt;with&gt; depth" in text and "<with>" not in text
    assert "kind: colabator" in text and f"torch {torch.__version__.partition('+')[0]}" in text
    assert "best val/fade 2.5000: c.png" in text and "worst val/fade 3.0000: a.png" in text
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert sources and all(source.startswith(("data:image/", "#", "button.dataset")) for source in sources)


def test_a_run_without_held_out_images_has_a_report_too(dataset, tmp_path):
    network = CORUN(2, 4)
    save_network(tmp_path / "network.pth", network, network)
    (tmp_path / SPEC_FILE).write_text(NetworkSpec("corun", {"stages": 2, "width": 4}).to_json())
    job, run = small_job("pretrain", dataset, tmp_path), locate(str(tmp_path / "run"))
    text = build_training_report(
        job, run, tmp_path, {"data": "8 clear"}, {"loss/total": [(1, 1.0)]}, ValidationLog()
    ).decode()
    assert re.findall(r"<h2[^>]*>([^<]+)</h2>", text) == ["Curves", "Job", "Environment"]


def test_the_best_checkpoint_and_images_without_a_value_are_told(dataset, tmp_path):
    network = CORUN(2, 4)
    save_network(tmp_path / "network.pth", network, network)
    (tmp_path / SPEC_FILE).write_text(NetworkSpec("corun", {"stages": 2, "width": 4}).to_json())
    log = ValidationLog()
    for image, psnr in zip(IMAGES, (20.0, math.inf, math.nan), strict=True):
        log.add(4, [MeasuredImage("val", image, {"psnr": psnr})])
    job, run = small_job("pretrain", dataset, tmp_path), locate(str(tmp_path / "run"))
    best = BestCheckpoint("val/psnr", 2, 21.5)
    text = build_training_report(job, run, tmp_path, {"data": "8 clear"}, {}, log, best).decode()
    assert "The best checkpoint: step 2, val/psnr 21.5000." in text and "<td>20.0000</td>" in text
    assert "val/psnr: 2 of 3 images left out: b.png (infinite), c.png (no value)" in text


def test_charts_are_plain_svg_of_the_pages_width():
    svg = draw_line_chart("Losses <1>", {"total": [(n, 1 / n) for n in range(1, 5000)], "one": [(1, 2.0)]})
    head = svg.partition(">")[0]
    assert svg.startswith("<svg") and "viewBox" in head and " width=" not in head and " height=" not in head
    assert "Losses &lt;1&gt;" in svg and len(svg) < 60_000


def test_sections_without_items_are_left_out_and_text_is_escaped():
    text = render(
        "<b>", "s", [PageSection("Empty", "", []), PageSection("Full", "", [Table(["<i>"], [["x"]]), Listing("a<b")])]
    )
    page = text.decode()
    assert "Empty" not in page and "&lt;b&gt;" in page and "&lt;i&gt;" in page and "a&lt;b" in page


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, page_file) -> Iterator[Page]:
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
    page = context.new_page()
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(page_file.as_uri())
    yield page
    context.close()
    assert problems == []
    assert all(url.startswith(("file:", "data:")) for url in asked)


def position(page: Page) -> float:
    """Where the edge between before and after is, as a share of the picture's width."""
    clip = page.locator(".before").first.evaluate("node => getComputedStyle(node).clipPath")
    right = re.fullmatch(r"inset\(0px (?:calc\(100% - ([\d.]+)%\)|([\d.]+)%) 0px 0px\)", clip)
    assert right, clip
    return float(right[1]) / 100 if right[1] else 1 - float(right[2]) / 100


def test_the_slider_follows_the_bar_and_the_pointer(page):
    assert position(page) == pytest.approx(0.5)
    page.locator(".slider input").first.fill("80")
    assert position(page) == pytest.approx(0.8)
    page.locator(".stack").first.scroll_into_view_if_needed()
    box = page.locator(".stack").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 20)
    page.mouse.up()
    assert position(page) == pytest.approx(0.25, abs=0.01)
    assert page.locator(".slider input").first.input_value() == "25"


def test_a_step_is_chosen_by_its_button(page):
    slider = page.locator(".slider").first
    last = slider.locator(".after").get_attribute("src")
    assert slider.locator("button[aria-pressed=true]").inner_text() == "step 4"
    slider.get_by_text("step 2").click()
    assert slider.locator("button[aria-pressed=true]").inner_text() == "step 2"
    assert slider.locator(".after").get_attribute("src") != last
    sizes = slider.locator("img").evaluate_all("nodes => nodes.map(node => [node.naturalWidth, node.naturalHeight])")
    assert sizes == [[120, 90], [120, 90]]


def test_the_page_fits_its_width_and_shows_its_pictures(page):
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]
    assert page.locator("img").evaluate_all("nodes => nodes.every(node => node.complete && node.naturalWidth > 0)")
    assert page.locator("svg").count() >= 5
